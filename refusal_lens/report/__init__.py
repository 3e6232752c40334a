"""The report: results as one self-contained HTML page."""

from .figures import Figure, figures
from .page import html, write_report

__all__ = ["Figure", "figures", "html", "write_report"]
