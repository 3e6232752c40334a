"""Results -> one self-contained HTML page, for a reader who was not there."""

from .figures import Figure, figures
from .page import html, write_report

__all__ = ["Figure", "figures", "html", "write_report"]
