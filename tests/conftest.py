"""What several test files share."""

import os
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
def smollm2_file() -> Path:
    """The real chat model SmolLM2-135M-Instruct as a GGUF file, which `.ci/run` fetches."""
    path = Path(os.environ.get("REFUSAL_LENS_SMOLLM2", "unset"))
    if not path.is_file():
        pytest.skip("REFUSAL_LENS_SMOLLM2 names no file of SmolLM2-135M-Instruct")
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_file):
    """That model, loaded once for all tests."""
    from refusal_lens import load_model

    return load_model(str(smollm2_file), device="cpu")


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
