"""Run the notebooks, and write them with their outputs and a picture beside each interactive figure.

    python tests/benchmarks/notebook_outputs.py [NAME ...]

NAME is the beginning of a notebook's name, such as 02; by default all run. A page that hosts notebooks
runs no script and shows the picture. Figures of more than `LARGEST` bytes are kept as a picture alone.
The pictures are drawn by Chromium and its driver, and saved by pillow. Temporary folders become
"folder". Prints the seconds that each notebook takes.
"""

import base64
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image
from plotly.offline import get_plotlyjs
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PLOTLY, PICTURE = "application/vnd.plotly.v1+json", "image/png"
LARGEST = 120_000
WIDTH = 760
DRAW = """
const [figure, width, done] = arguments;
const { data, layout } = JSON.parse(figure), height = layout.height || 420;
const options = { format: "png", width, height, scale: 1.5 };
Plotly.toImage({ data, layout: { ...layout, width, height } }, options).then(done);
"""


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """A browser with an empty page that holds plotly."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium") or shutil.which("google-chrome"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(f"<!doctype html><script>{get_plotlyjs()}</script>", "utf-8")
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            driver.get(page.as_uri())
            yield driver
        finally:
            driver.quit()


def picture(driver: webdriver.Chrome, figure: Any) -> str:
    """A figure as a small PNG in base64."""
    url = driver.execute_async_script(DRAW, json.dumps(figure), WIDTH)
    drawn = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    few = drawn.convert("RGB").quantize(96, dither=Image.Dither.NONE)
    few.save(small := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def add_pictures(notebook: Any, driver: webdriver.Chrome) -> None:
    """Put a picture beside every figure, and drop everything that differs from run to run."""
    for cell in notebook.cells:
        cell.metadata = {}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if (figure := data.get(PLOTLY)) is None:
                continue
            figure.pop("config", None)
            data[PICTURE] = picture(driver, figure)
            data.pop("text/html", None)
            if len(json.dumps(figure)) > LARGEST:
                del data[PLOTLY]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def _is_progress(output: Any) -> bool:
    """Whether an output is a progress bar or a warning of the kernel's."""
    widget = "application/vnd.jupyter.widget-view+json"
    return output.get("name") == "stderr" or widget in output.get("data", {})


def main(names: list[str]) -> None:
    """Run the notebooks whose names begin so."""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    with browser() as driver:
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            if names and not path.name.startswith(tuple(names)):
                continue
            notebook, begun = nbformat.read(path, 4), time.monotonic()
            NotebookClient(
                notebook, timeout=600, resources={"metadata": {"path": NOTEBOOKS}}
            ).execute()
            taken = time.monotonic() - begun
            add_pictures(notebook, driver)
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            text = re.sub(rf"{tempfile.gettempdir()}/\w+", "folder", text)
            path.write_text(text, "utf-8")
            print(f"{path.name}: {taken:.0f} s, {len(text) / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
