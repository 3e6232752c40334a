"""What was computed before is found by everything that decides it, and by nothing less."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors import safe_open
from torch import Tensor

from refusal_lens.activations import batching as reading
from refusal_lens.activations import extract as activations
from refusal_lens.activations import store as storing
from refusal_lens.activations.extract import ContrastActivations, extract, get_prompt_activations
from refusal_lens.activations.store import Cache, default_folder, digest
from refusal_lens.errors import InputError
from refusal_lens.experiment import lazy_model
from refusal_lens.experiment.distributed import ALONE
from refusal_lens.experiment.lazy_model import LazyModel
from refusal_lens.models.load import load_model
from refusal_lens.prompts.contrast import Contrast
from refusal_lens.prompts.protocol import Protocol

PROMPTS = tuple(
    f"{'Please, ' * (i % 4)}tell me {what}."
    for i, what in enumerate(["a joke", "the time", "a lie", "nothing", "a name", "it", "a story"])
)
MORE = tuple(f"Count to {i * i}." for i in range(10))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def computed(monkeypatch):
    """The rows of every batch that is run through a model."""
    batches = []
    forward = reading._forward

    def counted(model, rows, batch, prefix):
        batches.append(len(batch))
        return forward(model, rows, batch, prefix)

    monkeypatch.setattr(reading, "_forward", counted)
    return batches


def read(folder: Path, cache: Cache | None, prompts=PROMPTS, **options) -> tuple[Tensor, LazyModel]:
    options = {"batch_size": 3, "progress": False} | options
    model = LazyModel(str(folder))
    return get_prompt_activations(model, prompts, cache=cache, **options), model


def files(cache: Cache, kind: str = "activations") -> list[Path]:
    return sorted(cache.folder.glob(f"{kind}/*/*"))


# --- activations ----------------------------------------------------------------------------------


def test_a_second_run_loads_no_model_and_gives_the_same_bits(checkpoint, cache, computed):
    first, model = read(checkpoint, cache)
    assert model.is_loaded
    assert sum(computed) == len(PROMPTS)
    again, model = read(checkpoint, cache)
    assert not model.is_loaded
    assert sum(computed) == len(PROMPTS)
    assert torch.equal(first, again)
    plain, _ = read(checkpoint, None)
    assert torch.equal(first, plain)


def test_contrasts_come_out_of_the_cache_as_they_went_in(checkpoint, cache):
    contrasts = [
        Contrast("a", PROMPTS[:3], PROMPTS[3:], target_name="x", baseline_name="y", paired=False),
        Contrast("b", MORE[:5], MORE[5:], target_name="x", baseline_name="y", paired=False),
    ]
    model = LazyModel(str(checkpoint))
    first = extract(model, contrasts, cache=cache, progress=False)
    later = LazyModel(str(checkpoint))
    again = extract(later, contrasts, cache=cache, progress=False)
    plain = extract(load_model(str(checkpoint)), contrasts, progress=False)
    assert not later.is_loaded
    for name in ("a", "b"):
        assert isinstance(again[name], ContrastActivations)
        for sides in zip(first[name], again[name], plain[name], strict=True):
            assert torch.equal(sides[0], sides[1])
            assert torch.equal(sides[0], sides[2])


def test_ten_prompts_more_are_ten_prompts_computed(checkpoint, cache, computed):
    first, _ = read(checkpoint, cache)
    computed.clear()
    both, _ = read(checkpoint, cache, (*MORE[:5], *PROMPTS, *MORE[5:]))
    assert sum(computed) == 10
    assert torch.equal(both[5:-5], first)
    alone, _ = read(checkpoint, None, MORE)
    torch.testing.assert_close(torch.cat([both[:5], both[-5:]]), alone, rtol=1e-5, atol=1e-5)
    computed.clear()
    read(checkpoint, cache, MORE[::-1])
    assert computed == []


def test_a_prompt_that_comes_twice_is_computed_once(checkpoint, cache, computed):
    twice = (*PROMPTS, PROMPTS[2], PROMPTS[0])
    values, _ = read(checkpoint, cache, twice)
    assert sum(computed) == len(PROMPTS)
    assert torch.equal(values[-2], values[2])
    assert torch.equal(values[-1], values[0])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(system_prompt="Be brief."),
        Protocol(generation_prompt=False),
        Protocol(positions=(-2,)),
        Protocol(chat_template="{{ bos_token }}{{ messages[0]['content'] }}!"),
    ],
    ids=lambda protocol: str(protocol.to_dict()),
)
def test_another_protocol_is_another_key(checkpoint, cache, computed, protocol):
    read(checkpoint, cache)
    computed.clear()
    read(checkpoint, cache, protocol=protocol)
    assert sum(computed) == len(PROMPTS)


def test_a_protocol_s_name_decides_nothing(checkpoint, cache, computed):
    read(checkpoint, cache)
    computed.clear()
    read(checkpoint, cache, protocol=Protocol(name="mine"))
    assert computed == []


def test_other_weights_template_dtype_or_versions_are_another_model(tmp_path, monkeypatch):
    def identity(**options):
        return digest(LazyModel(str(folder), **options).identity)

    folder = write_checkpoint(tmp_path / "model")
    seen = [identity()]
    assert identity() == seen[0]
    seen.append(identity(dtype=torch.bfloat16))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "human") + "{# mine #}")
    seen.append(identity())
    write_checkpoint(folder, seed=1)
    seen.append(identity())
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    seen.append(identity())
    monkeypatch.setattr(lazy_model, "version", lambda package: "99.0")
    seen.append(identity())
    monkeypatch.setattr(lazy_model, "_source", lambda: "edited")
    seen.append(identity())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    seen.append(identity())
    torch.set_float32_matmul_precision(before)
    assert len(set(seen)) == len(seen)


def test_a_model_handed_over_is_neither_looked_up_nor_stored(checkpoint, cache, computed):
    read(checkpoint, cache)
    before = files(cache)
    computed.clear()
    model = load_model(str(checkpoint))
    get_prompt_activations(model, PROMPTS, cache=cache, progress=False)
    get_prompt_activations(model, MORE, cache=cache, progress=False)
    assert sum(computed) == len(PROMPTS) + len(MORE)
    assert files(cache) == before


def test_bfloat16_is_stored_as_it_is_and_comes_back_exactly(checkpoint, tmp_path):
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        cache = Cache(tmp_path / str(dtype))
        read_in = {"progress": False, "cache": cache}
        first = get_prompt_activations(LazyModel(str(checkpoint), dtype=dtype), PROMPTS, **read_in)
        again = get_prompt_activations(LazyModel(str(checkpoint), dtype=dtype), PROMPTS, **read_in)
        assert again.dtype == torch.float32
        assert torch.equal(first, again)
        sizes[dtype] = first.numel() * 4, sum(path.stat().st_size for path in files(cache))
    n_bytes, stored = sizes[torch.bfloat16]
    assert sizes[torch.float32][1] - stored == pytest.approx(n_bytes / 2, rel=0.01)


@pytest.mark.parametrize("n_finished", [0, 1, 2, 4])
def test_a_run_that_was_cut_off_goes_on_with_the_same_batches(
    checkpoint, cache, computed, monkeypatch, n_finished
):
    prompts = (*PROMPTS, *MORE)
    whole, _ = read(checkpoint, None, prompts)
    undisturbed = [*computed]
    counted = reading._forward

    def cut_off(model, rows, batch, prefix):
        if len(computed) == n_finished:
            raise KeyboardInterrupt
        return counted(model, rows, batch, prefix)

    computed.clear()
    monkeypatch.setattr(reading, "_forward", cut_off)
    with pytest.raises(KeyboardInterrupt):
        read(checkpoint, cache, prompts)
    assert len(files(cache)) == n_finished
    monkeypatch.setattr(reading, "_forward", counted)
    resumed, _ = read(checkpoint, cache, prompts)
    assert computed == undisturbed
    assert torch.equal(resumed, whole)


def test_the_progress_bar_begins_where_the_run_goes_on(checkpoint, cache, capsys):
    read(checkpoint, cache)
    read(checkpoint, cache, (*PROMPTS, *MORE), progress=True)
    shown = capsys.readouterr().err
    assert " 7/17 " in shown
    assert "17/17" in shown


@pytest.mark.parametrize(
    ("prompts", "message"),
    [((), "no prompts"), ("a single string", "single string"), (["a", "\ud800"], "surrogate")],
)
def test_what_is_no_prompt_is_refused_with_a_cache_too(checkpoint, cache, prompts, message):
    with pytest.raises(InputError, match=message):
        activations._run(
            LazyModel(str(checkpoint)), prompts, [*prompts], Protocol(), 1, False, cache, ALONE
        )


def test_a_name_or_device_that_is_wrong_is_an_error_before_anything_is_loaded():
    with pytest.raises(InputError, match="no organism"):
        LazyModel("organism:nobody")
    with pytest.raises(InputError, match="is no device"):
        LazyModel("organism:specific", device="abacus")


# --- everything else ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    values: Tensor
    name: str
    parts: dict[str, tuple[float, None, bool]]


ANSWER = Answer(torch.tensor([0.1, torch.nan, -0.0]), "it", {"a": (0.1, None, True)})


def test_what_was_computed_once_is_remembered_bit_for_bit(cache):
    calls = []

    def compute():
        calls.append(1)
        return ANSWER

    key = {"directions": torch.arange(3.0), "layer": 3, "protocol": Protocol()}
    for _ in range(2):
        answer = cache.remember(key, compute, (Answer,))
    assert len(calls) == 1
    assert answer.name == ANSWER.name
    assert answer.parts == ANSWER.parts
    assert torch.equal(answer.values.view(torch.int32), ANSWER.values.view(torch.int32))
    cache.remember(key | {"directions": torch.tensor([0.0, 1.0, 2.0000002])}, compute, (Answer,))
    cache.remember(key | {"layer": 4}, compute, (Answer,))
    assert len(calls) == 3


def test_tensors_that_share_their_memory_are_remembered_too(cache):
    whole = torch.arange(6.0)
    answer = {"whole": whole, "again": whole, "part": whole[2:4]}
    cache.remember({"a": 1}, lambda: answer)

    def never():
        raise AssertionError("computed again")

    found = cache.remember({"a": 1}, never)
    assert all(torch.equal(found[name], tensor) for name, tensor in answer.items())


def test_a_key_is_what_it_holds_and_not_the_order_it_is_written_in():
    one = {"a": torch.ones(2, 3), "b": [1, 2.5, None, float("nan")]}
    assert digest(one) == digest(dict(reversed(one.items())))
    others = [
        one | {"a": torch.ones(3, 2)},
        one | {"a": torch.ones(2, 3, dtype=torch.float64)},
        one | {"a": torch.ones(2, 3, dtype=torch.bfloat16)},
        one | {"b": (1, 2.5, None, float("nan"))},
        one | {"b": [1, 2.5, None, "nan"]},
        one | {"c": True},
    ]
    assert len({digest(one), *map(digest, others)}) == 7


def test_an_answer_of_an_unknown_kind_is_computed_again(cache):
    cache.remember({"a": 1}, lambda: ANSWER, (Answer,))
    assert cache.remember({"a": 1}, lambda: "afresh") == "afresh"


def test_without_a_folder_nothing_is_remembered(checkpoint, tmp_path, computed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nothing = Cache(None)
    assert [nothing.remember({}, lambda i=i: i) for i in range(2)] == [0, 1]
    read(checkpoint, nothing)
    read(checkpoint, nothing)
    assert sum(computed) == 2 * len(PROMPTS)
    assert nothing.holdings() == []
    assert nothing.clear() == 0
    assert [*tmp_path.iterdir()] == []


# --- the folder -----------------------------------------------------------------------------------


def test_the_default_folder_is_where_the_system_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv(storing.FOLDER_VARIABLE, str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv(storing.FOLDER_VARIABLE)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for platform, variable, expected in (
        ("linux", "XDG_CACHE_HOME", ".cache/refusal_lens"),
        ("darwin", "XDG_CACHE_HOME", "Library/Caches/refusal_lens"),
        ("win32", "LOCALAPPDATA", "AppData/Local/refusal_lens"),
    ):
        monkeypatch.setattr(storing.sys, "platform", platform)
        monkeypatch.delenv(variable, raising=False)
        assert default_folder() == tmp_path / expected
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_folder() == tmp_path / "local" / "refusal_lens"


def test_a_cache_tells_what_it_holds_and_clears_nothing_else(checkpoint, cache):
    read(checkpoint, cache)
    cache.remember({"a": 1}, lambda: ANSWER, (Answer,))
    strangers = [cache.folder / "mine.txt", cache.folder / "activations" / "notes" / "mine.txt"]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_text("keep")
    model, others = cache.holdings()
    assert model.what == f"{checkpoint}, float32"
    assert (model.n_files, model.n_prompts) == (3, len(PROMPTS))
    assert (others.what, others.n_files, others.n_prompts) == ("other results", 1, 0)
    assert cache.clear() == model.n_bytes + others.n_bytes > 0
    assert {path for path in cache.folder.rglob("*") if path.is_file()} == {*strangers}
    assert cache.holdings() == [storing.Holding("other results", 0, 0, 0)]


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="is a file: name a folder"):
        Cache(tmp_path / "cache")


def test_what_a_file_is_keyed_by_can_be_read_in_it(checkpoint, cache):
    read(checkpoint, cache)
    with safe_open(files(cache)[0], "pt") as file:
        key = json.loads(file.metadata()[storing.ABOUT])["key"]
    assert key["model"] == str(checkpoint)
    assert key["protocol"]["positions"] == [-1]
    assert {"refusal_lens", "transformer_lens", "torch", "transformers"} <= set(key["versions"])


def test_a_run_beside_another_that_writes_the_same_reads_whole_files_alone(
    checkpoint, cache, monkeypatch, caplog
):
    """Another process's half-written file and its finished files are there while this one runs."""
    whole, _ = read(checkpoint, cache)
    shelf = files(cache)[0].parent
    finished = {path.name: path.read_bytes() for path in shelf.iterdir()}
    for path in shelf.iterdir():
        path.unlink()
    half = shelf / f"{storing.PARTIAL}other"
    forward = reading._forward

    def meanwhile(*arguments):
        half.write_bytes(next(iter(finished.values()))[:100])
        for name, content in finished.items():
            (shelf / name).write_bytes(content)
        return forward(*arguments)

    monkeypatch.setattr(reading, "_forward", meanwhile)
    with caplog.at_level(logging.WARNING, logger=storing.__name__):
        beside, _ = read(checkpoint, cache)
    assert torch.equal(beside, whole)
    assert [record for record in caplog.records if record.name == storing.__name__] == []
    assert {path.name for path in shelf.iterdir()} == {half.name, *finished}
    assert half.stat().st_size == 100


def test_what_a_dead_process_left_unfinished_goes_in_time(checkpoint, cache):
    read(checkpoint, cache)
    shelf = files(cache)[0].parent
    young, old = shelf / f"{storing.PARTIAL}young", shelf / f"{storing.PARTIAL}old"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    read(checkpoint, cache, MORE)
    assert young.exists()
    assert not old.exists()
