"""What several test files share."""

from functools import cache
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of artefacts published by others, kept beside the checkout where it is kept."""
    folder = Path(__file__).parents[1].parent / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip(f"no reference artefacts at {folder}")
    return folder


@pytest.fixture(scope="session")
def quick_results():
    """Results of the experiment on some prompts and a bundled organism, each run once:
    `quick_results("specific")`.
    """
    from refusal_lens import Config, run_experiment

    @cache
    def run(organism: str):
        config = Config(model=f"organism:{organism}", max_prompts=32, n_resamples=1000)
        return run_experiment(config, progress=False)

    return run
