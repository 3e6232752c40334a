"""What several test files share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of artefacts published by others, kept beside the checkout where it is kept."""
    folder = Path(__file__).parents[1].parent / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip(f"no reference artefacts at {folder}")
    return folder
