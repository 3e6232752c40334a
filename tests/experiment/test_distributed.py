"""A run over several processes: the numbers of a single process, and what happens when one dies."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file

import refusal_lens as rl
from refusal_lens.activations.store import Cache
from refusal_lens.experiment import causal, distributed
from refusal_lens.experiment.causal import divide_sweep
from refusal_lens.interventions import ablation_effects
from refusal_lens.interventions.selection import FILE, LAYERS_AT_ONCE

pytest.importorskip("accelerate")
PROGRAM = Path(__file__).parents[1] / "one_of_several.py"
# In a model that refuses nothing what these are relative to is rounding, at early layers a KL of
# 1e-7: another number of processes makes other batches, and moved one of them by 18 %.
RATIOS = (
    *("refusal_ablation", "typical_ablation", "chance_ablation", "cross_ablation"),
    *("cross_addition", "statement_ablation", "chance_statement_ablation"),
    *("earlier_ablation", "earlier_damage"),
)
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


def same_numbers(folder: Path, other: Path, ratios: tuple[str, ...] = ()) -> None:
    """Every tensor and every number but `ratios` that two runs saved is the same, up to rounding."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    for file in (file for file in files if file.suffix == ".safetensors"):
        tensors = load_file(other / file)
        for name, tensor in load_file(folder / file).items():
            torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-4, equal_nan=True)
    for file in (file for file in files if file.suffix == ".json"):
        a, b = (json.loads((path / file).read_text()) for path in (folder, other))
        assert close(a, b, ratios), file


def close(a, b, ratios: tuple[str, ...]) -> bool:
    if isinstance(a, dict):
        shared = a.keys() - {*ratios}
        return a.keys() == b.keys() and all(close(a[key], b[key], ratios) for key in shared)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(*pair, ratios) for pair in zip(a, b, strict=True))
    return a == b or abs(a - b) <= 1e-4 * max(1, abs(a), abs(b))


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_numbers_of_one_and_one_of_them_speaks(n, checkpoint, tmp_path):
    done = run(n, checkpoint, tmp_path / "several", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verdict:") == 1
    assert done.stdout.count("Written to") == 1
    alone = run(1, checkpoint, tmp_path / "alone", tmp_path / "another cache")
    assert alone.returncode == 0, alone.stderr
    same_numbers(tmp_path / "several", tmp_path / "alone")


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


@pytest.mark.slow
def test_a_process_that_dies_choosing_leaves_the_candidates_that_were_finished(tmp_path):
    select = ["select", "--model", "organism:oblivious", "--quiet", "--out"]
    done = launch(2, [*select, str(tmp_path / "out")], rank=1, how="dies choosing")
    assert done.returncode != 0
    assert len(said(done)) == 1
    kept = json.loads((tmp_path / "out" / FILE).read_text())["candidates"]
    assert len(kept) == 5 * LAYERS_AT_ONCE
    again = launch(2, [*select, str(tmp_path / "out")], rank=1, how="dies choosing")
    assert again.returncode == 0, "the rest is one call, of the candidates not yet finished"
    alone = launch(1, [*select, str(tmp_path / "alone")])
    assert alone.returncode == 0, alone.stderr
    same_numbers(tmp_path / "out", tmp_path / "alone")


@pytest.mark.slow
def test_a_process_that_dies_leaves_the_organisms_of_the_demo_that_were_finished(tmp_path):
    demo = ["demo", "--max-prompts", "4", "--quiet", "--out", str(tmp_path / "out")]
    demo += ["--cache", str(tmp_path / "cache")]
    done = launch(2, demo, rank=0, how="dies loading")
    assert done.returncode != 0
    assert len(said(done)) == 1
    assert (tmp_path / "out" / "specific" / "report.html").exists()
    assert not (tmp_path / "out" / "oblivious").exists()
    again = launch(2, demo, rank=0, how="dies loading")
    assert again.returncode == 0, "the organism that was finished is not loaded again"
    assert (tmp_path / "out" / "oblivious" / "report.html").exists()


@pytest.mark.slow
def test_a_process_that_dies_leaves_the_specifications_that_were_finished(tmp_path):
    options = ["--causal-prompts", "4", "--max-prompts", "16", "--quiet"]
    sensitivity = ["sensitivity", "--model", "organism:oblivious", *options]
    sensitivity += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    done = launch(2, sensitivity, rank=1, how="dies ablating")
    assert done.returncode != 0
    assert len(said(done)) == 1
    cache = Cache(tmp_path / "cache")
    [(kept, *_)] = cache.holdings().values()
    assert kept == 2, "the activations, and the effects of the first directions"
    times = {path: path.stat().st_mtime_ns for path in cache._files()}
    again = launch(2, sensitivity)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert cache.holdings()["other results"][0] > kept


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
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--max-prompts", "6"],
        ["sensitivity", "--model", "organism:oblivious", "--causal-prompts", "4"],
        ["select", "--model", "organism:oblivious"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_several_processes_divide_models_specifications_and_candidates(n, arguments, tmp_path):
    for processes, out in ((n, tmp_path / "several"), (1, tmp_path / "alone")):
        cache = [] if arguments[0] == "select" else ["--cache", f"{out} finished"]
        done = launch(processes, [*arguments, "--quiet", "--out", str(out), *cache])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written to") == 1
    ratios = RATIOS if arguments[0] == "sensitivity" else ()
    same_numbers(tmp_path / "several", tmp_path / "alone", ratios)


def one_of(processes: int):
    """`in_shares` with the results of all processes, which run in turn."""
    shares = [slice(rank, None, processes) for rank in range(processes)]
    return lambda run: [run(share) for share in shares]


def test_divided_candidates_and_layers_have_the_scores_of_undivided_ones(checkpoint, monkeypatch):
    model, refusal = rl.load_model(str(checkpoint)), rl.load_contrast("refusal")
    few = rl.Contrast("few", refusal.target[:8], refusal.baseline[:8])
    select = partial(rl.select_direction, model, few, progress=False)
    alone, divided = select(), select(divide=one_of(3))
    for name in ("ablation", "addition", "kl"):
        scores, others = (getattr(each.scores, name) for each in (alone, divided))
        torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(causal, "in_shares", one_of(3))
    options = {"score": alone.refusal_tokens, "progress": False}
    ablate = partial(ablation_effects, model, few.target, **options)
    whole, swept = ablate(alone.directions[0]), divide_sweep(ablate, alone.directions[0])
    for name, values in vars(whole).items():
        torch.testing.assert_close(getattr(swept, name), values, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole.log_odds[0], whole.log_odds[1], rtol=1e-4, atol=1e-4)


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


def test_a_process_takes_as_many_gpus_as_its_model_is_spread_over(monkeypatch, checkpoint):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [distributed.own_device(None, n) for n in (1, 2)] == ["cuda:3", "cuda:6"]
    assert distributed.own_device("cuda:1", 2) == "cuda:1"
    with pytest.raises(rl.InputError, match="n_devices=2 spreads a model over GPUs"):
        rl.run_experiment(rl.Config(model=str(checkpoint), device="cpu", n_devices=2))
