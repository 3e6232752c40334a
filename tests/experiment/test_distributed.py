"""A run over several processes: the numbers of one, and what becomes of it when a process dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

import refusal_lens as rl
from refusal_lens.activations.store import Cache
from refusal_lens.errors import InputError
from refusal_lens.experiment.distributed import ALONE, Team

pytest.importorskip("accelerate")
PROGRAM = Path(__file__).parents[1] / "one_of_several.py"
OPTIONS = ("--max-prompts", "12", "--resamples", "400", "--batch-size", "6", "--controls", "alarm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def run(n: int, checkpoint: Path, out: Path, *, dies: int = -1, cache: Path):
    """`n` processes of one run; their outputs together."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(n), str(PROGRAM), str(dies)),
        *("run", "--model", str(checkpoint), "--out", str(out), "--cache", str(cache), *OPTIONS),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def numbers(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["by_layer"]


def close(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b or abs(a - b) <= 1e-6 * max(abs(a), abs(b))


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_numbers_of_one_and_one_of_them_speaks(n, checkpoint, tmp_path):
    done = run(n, checkpoint, tmp_path / "several", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verdict:") == 1
    assert done.stdout.count("Written to") == 1
    alone = rl.run_experiment(
        rl.Config(
            model=str(checkpoint),
            max_prompts=12,
            n_resamples=400,
            batch_size=6,
            controls=("alarm",),
        ),
        progress=False,
    )
    alone.save(tmp_path / "alone")
    assert close(numbers(tmp_path / "several"), numbers(tmp_path / "alone"))


def test_a_process_that_dies_ends_the_run_and_what_was_finished_is_kept(checkpoint, tmp_path):
    cache = tmp_path / "cache"
    done = run(2, checkpoint, tmp_path / "out", dies=1, cache=cache)
    assert done.returncode != 0
    assert "start" in done.stderr
    assert "in the cache" in done.stderr
    assert not (tmp_path / "out" / "results.json").exists()
    kept = sum(holding.n_prompts for holding in Cache(cache).holdings())
    assert 0 < kept < 6 * 12
    again = run(2, checkpoint, tmp_path / "out", cache=cache)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "results.json").exists()


def test_the_work_is_divided_without_rest_or_overlap():
    items = list(range(11))
    shares = [Team(rank, 4).share(items) for rank in range(4)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_everything_is_ones_own():
    assert ALONE.leads
    assert ALONE.gather(3) == [3]
    assert ALONE.once(lambda: 5) == 5

    def wrong():
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        ALONE.agreed(wrong)
