"""A cache of its own for each test, and a count of what is computed anew."""

import pytest

from refusal_lens.activations import extract as extraction
from refusal_lens.activations.store import Cache


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def computed(monkeypatch):
    """The sizes of the batches that are run through a model."""
    batches = []
    run_batch = extraction._run_batch

    def counted(model, rows, batch, prefix):
        batches.append(len(batch))
        return run_batch(model, rows, batch, prefix)

    monkeypatch.setattr(extraction, "_run_batch", counted)
    return batches
