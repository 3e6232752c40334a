"""The notebooks are committed as they ran; that they still run is for nbmake (`pytest --nbmake`)."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS
PLOTLY, PICTURE = "application/vnd.plotly.v1+json", "image/png"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def cells(request) -> list[dict]:
    return json.loads(request.param.read_text("utf-8"))["cells"]


def code(cells: list[dict]) -> str:
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def outputs(cells: list[dict]) -> list[dict]:
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_every_cell_ran_in_order_and_without_error(cells):
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert [each for each in outputs(cells) if each["output_type"] == "error"] == []


def test_every_figure_has_a_picture_for_pages_that_run_no_script(cells):
    drawn = [each["data"] for each in outputs(cells) if PLOTLY in each.get("data", {})]
    assert all(len(data[PICTURE]) > 5000 for data in drawn)
    assert [each for each in outputs(cells) if "widget" in json.dumps(each)] == []


def test_no_output_tells_where_it_was_made(cells):
    shown = json.dumps(outputs(cells))
    assert re.findall(r"/(?:tmp|home|root|work|Users|usr)/\w+|[A-Z]:\\\\", shown) == []


def test_a_notebook_stays_small_enough_for_git(cells):
    assert len(json.dumps(cells)) < 1_500_000


def test_it_can_be_run_where_the_package_is_not_installed(cells):
    assert "%pip install -q .." in code(cells[:2])


def test_a_badge_opens_the_page_where_it_is_uploaded(cells):
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    linked = f"[![Open in Colab]({badge})](https://colab.research.google.com/#upload=true)"
    assert linked in "".join(cells[0]["source"])


def test_no_function_is_defined_that_the_package_lacks(cells):
    assert "def " not in code(cells)
    assert "lambda" not in code(cells)


def test_it_begins_with_what_it_is_about(cells):
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
