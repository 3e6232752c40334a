"""A run over several processes: the numbers of a single process, and what happens when one dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

import refusal_lens as rl
from refusal_lens.activations.store import Cache
from refusal_lens.experiment import distributed

pytest.importorskip("accelerate")
PROGRAM = Path(__file__).parents[1] / "one_of_several.py"
OPTIONS = ("--max-prompts", "12", "--resamples", "400", "--batch-size", "6", "--controls", "alarm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def launch(
    n: int, arguments: list[str], rank: int = -1, how: str = "dies"
) -> subprocess.CompletedProcess[str]:
    """The command `refusal-lens` in `n` processes, of which one may fail; their outputs together."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(n), str(PROGRAM), str(rank), how, *arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def run(n: int, checkpoint: Path, out: Path, cache: Path, *options: str, **fails):
    folders = ["--model", str(checkpoint), "--out", str(out), "--cache", str(cache)]
    return launch(n, ["run", "--quiet", *folders, *OPTIONS, *options], **fails)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of the command itself on stderr, without the launcher's."""
    return [line for line in done.stderr.splitlines() if line.startswith("refusal-lens:")]


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
    done = run(n, checkpoint, tmp_path / "several", tmp_path / "cache")
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


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_run_with_one_line_and_what_was_finished_is_kept(
    rank, checkpoint, tmp_path
):
    cache = tmp_path / "cache"
    done = run(2, checkpoint, tmp_path / "out", cache, rank=rank)
    assert done.returncode != 0
    (line,) = said(done)
    assert "start the run again, it resumes from the cache" in line
    assert not (tmp_path / "out" / "results.json").exists()
    kept = sum(n_prompts for _, n_prompts, _ in Cache(cache).holdings().values())
    assert 0 < kept < 6 * 12
    again = run(2, checkpoint, tmp_path / "out", cache)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "fails", "message"),
    [
        (["--layer", "99"], {}, "layer 99 is out of range"),
        ([], {"rank": 1, "how": "errs"}, "this GPU is full"),
    ],
    ids=["in every process", "in one process"],
)
def test_a_mistake_ends_the_run_with_one_line(options, fails, message, checkpoint, tmp_path):
    done = run(2, checkpoint, tmp_path / "out", tmp_path / "cache", *options, **fails)
    assert done.returncode != 0
    (line,) = said(done)
    assert message in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--prompts", "6"],
        ["sensitivity", "--model", "organism:oblivious", "--causal-prompts", "4"],
    ],
    ids=["demo", "sensitivity"],
)
def test_several_processes_divide_experiments_and_specifications(arguments, tmp_path):
    done = launch(2, [*arguments, "--quiet", "--out", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1
    assert any((tmp_path / "out").rglob("*.json"))


def as_the_second_of_three(monkeypatch, first: list, third: list):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(distributed, "_gather", lambda own: [first, own, third])


def test_each_process_runs_its_share_and_gets_all_results_in_order(monkeypatch):
    ran = []

    def task(i):
        ran.append(i)
        return i

    as_the_second_of_three(monkeypatch, [0, 3], [2])
    assert distributed.divide([lambda i=i: task(i) for i in range(5)]) == [0, 1, 2, 3, 4]
    assert ran == [1, 4]


def test_a_task_that_divides_runs_its_tasks_itself(monkeypatch):
    as_the_second_of_three(monkeypatch, [0], [2])

    def divides():
        assert distributed.is_main()
        return sum(distributed.divide([lambda: 1, lambda: 2, lambda: 3]))

    assert distributed.divide([divides] * 3) == [0, 6, 2]
    assert not distributed.is_main()


def test_alone_tasks_run_in_order():
    assert distributed.is_main()
    assert distributed.own_device("cpu") == "cpu"
    assert distributed.divide([lambda: 1, lambda: 2]) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        distributed.divide([lambda: 1 / 0])
