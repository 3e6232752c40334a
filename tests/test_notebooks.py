"""The notebooks are clean in git; that they run is for nbmake (`pytest --nbmake notebooks`)."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def cells(request) -> list[dict]:
    return json.loads(request.param.read_text("utf-8"))["cells"]


def code(cells: list[dict]) -> str:
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_no_outputs_are_kept(cells):
    kept = [c for c in cells if c.get("outputs") or c.get("execution_count") is not None]
    assert kept == []


def test_no_function_is_defined_that_the_package_lacks(cells):
    assert "def " not in code(cells)
    assert "lambda" not in code(cells)


def test_it_begins_with_what_it_is_about(cells):
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
