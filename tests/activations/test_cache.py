"""Stored activations and results are found by everything that decides them, and by nothing less."""

import json
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors import safe_open
from torch import Tensor

from refusal_lens.activations import extract as extraction
from refusal_lens.activations import store as storing
from refusal_lens.activations.extract import (
    ContrastActivations,
    by_contrast,
    extract,
    get_prompt_activations,
)
from refusal_lens.activations.store import Cache, default_folder, digest
from refusal_lens.errors import InputError
from refusal_lens.experiment import cached_model
from refusal_lens.experiment.cached_model import CachedModel
from refusal_lens.experiment.config import Config
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


def cached(folder: Path, cache: Cache | None = None, **options) -> CachedModel:
    return CachedModel(Config(model=str(folder), **options), cache or Cache(None))


def read(folder: Path, cache: Cache | None, prompts=PROMPTS, **options) -> tuple[Tensor, bool]:
    """The activations, and whether the model was loaded for them."""
    progress = options.pop("progress", False)
    model = cached(folder, cache, **({"batch_size": 3} | options))
    return model.prompt_activations(prompts, progress=progress), is_loaded(model)


def is_loaded(model: CachedModel) -> bool:
    return "model" in vars(model)


def files(cache: Cache) -> list[Path]:
    return sorted(cache.folder.glob("*/*"))


# --- activations ----------------------------------------------------------------------------------


def test_a_second_run_loads_no_model_and_gives_the_same_bits(checkpoint, cache, computed):
    first, loaded = read(checkpoint, cache)
    assert loaded
    assert sum(computed) == len(PROMPTS)
    again, loaded = read(checkpoint, cache)
    assert not loaded
    assert sum(computed) == len(PROMPTS)
    assert torch.equal(first, again)
    plain, _ = read(checkpoint, None)
    assert torch.equal(first, plain)


def test_contrasts_come_out_of_the_cache_as_they_went_in(checkpoint, cache):
    contrasts = [
        Contrast("a", PROMPTS[:3], PROMPTS[3:], target_name="x", baseline_name="y", paired=False),
        Contrast("b", MORE[:5], MORE[5:], target_name="x", baseline_name="y", paired=False),
    ]
    by_part = {contrast.name: contrast for contrast in contrasts}
    first = by_contrast(
        partial(cached(checkpoint, cache).prompt_activations, progress=False), by_part
    )
    later = cached(checkpoint, cache)
    again = by_contrast(partial(later.prompt_activations, progress=False), by_part)
    plain = extract(load_model(str(checkpoint)), contrasts, progress=False)
    assert not is_loaded(later)
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
def test_other_tokens_or_positions_are_computed(checkpoint, cache, computed, protocol):
    read(checkpoint, cache)
    computed.clear()
    read(checkpoint, cache, protocol=protocol)
    assert sum(computed) == len(PROMPTS)


@pytest.mark.parametrize("protocol", [Protocol(name="mine"), Protocol(positions=(-1,))])
def test_protocols_with_the_same_tokens_and_positions_share_activations(
    checkpoint, cache, computed, protocol
):
    read(checkpoint, cache)
    computed.clear()
    read(checkpoint, cache, protocol=protocol)
    assert computed == []


def test_other_weights_template_dtype_or_versions_are_another_model(tmp_path, monkeypatch):
    def identity(**options):
        return digest(cached(folder, **options).identity)

    folder = write_checkpoint(tmp_path / "model")
    seen = [identity()]
    assert identity() == seen[0]
    seen.append(identity(dtype="bfloat16"))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "human") + "{# mine #}")
    seen.append(identity())
    write_checkpoint(folder, seed=1)
    seen.append(identity())
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    seen.append(identity())
    monkeypatch.setattr(cached_model, "version", lambda package: "99.0")
    seen.append(identity())
    monkeypatch.setattr(cached_model, "ALGORITHM", 99)
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
    model = CachedModel(Config(model=str(checkpoint)), cache, model=load_model(str(checkpoint)))
    found = model.prompt_activations(PROMPTS, progress=False)
    model.prompt_activations(MORE, progress=False)
    assert sum(computed) == len(PROMPTS) + len(MORE)
    assert files(cache) == before
    plain = get_prompt_activations(model.model, PROMPTS, progress=False)
    assert torch.equal(found, plain)


def test_bfloat16_is_stored_as_it_is_and_comes_back_exactly(checkpoint, tmp_path):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        cache = Cache(tmp_path / dtype)
        first, again = (
            cached(checkpoint, cache, dtype=dtype).prompt_activations(PROMPTS, progress=False)
            for _ in range(2)
        )
        assert again.dtype == torch.float32
        assert torch.equal(first, again)
        sizes[dtype] = first.numel() * 4, sum(path.stat().st_size for path in files(cache))
    n_bytes, stored = sizes["bfloat16"]
    assert sizes["float32"][1] - stored == pytest.approx(n_bytes / 2, rel=0.01)


@pytest.mark.parametrize("n_finished", [0, 1, 2, 4])
def test_a_run_that_was_cut_off_goes_on_with_the_same_batches(
    checkpoint, cache, computed, monkeypatch, n_finished
):
    prompts = (*PROMPTS, *MORE)
    whole, _ = read(checkpoint, None, prompts)
    undisturbed = [*computed]
    counted = extraction._run_batch

    def cut_off(model, rows, batch, prefix):
        if len(computed) == n_finished:
            raise KeyboardInterrupt
        return counted(model, rows, batch, prefix)

    computed.clear()
    monkeypatch.setattr(extraction, "_run_batch", cut_off)
    with pytest.raises(KeyboardInterrupt):
        read(checkpoint, cache, prompts)
    assert len(files(cache)) == n_finished
    monkeypatch.setattr(extraction, "_run_batch", counted)
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
        read(checkpoint, cache, prompts)


def test_a_name_or_device_that_is_wrong_is_an_error_before_anything_is_loaded():
    with pytest.raises(InputError, match="no organism"):
        cached("organism:nobody")
    with pytest.raises(InputError, match="is no device"):
        cached("organism:specific", device="abacus")


# --- everything else ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    values: Tensor
    name: str
    parts: dict[str, tuple[float, None, bool]]


ANSWER = Answer(torch.tensor([0.1, torch.nan, -0.0]), "it", {"a": (0.1, None, True)})


def never():
    raise AssertionError("computed again")


def test_what_was_computed_once_is_remembered_bit_for_bit(checkpoint, cache):
    calls = []

    def compute():
        calls.append(1)
        return ANSWER

    key = {"prompts": ["a", "b"], "layer": 3, "protocol": Protocol().to_dict()}
    for _ in range(2):
        answer = cached(checkpoint, cache).remember("it", key, compute, (Answer,))
    assert len(calls) == 1
    assert answer.name == ANSWER.name
    assert answer.parts == ANSWER.parts
    assert torch.equal(answer.values.view(torch.int32), ANSWER.values.view(torch.int32))
    model = cached(checkpoint, cache)
    model.remember("another", key, compute, (Answer,))
    model.remember("it", key | {"prompts": ["b", "a"]}, compute, (Answer,))
    model.remember("it", key | {"layer": 4}, compute, (Answer,))
    assert len(calls) == 4


def test_tensors_that_share_their_memory_are_remembered_too(checkpoint, cache):
    whole = torch.arange(6.0)
    answer = {"whole": whole, "again": whole, "part": whole[2:4]}
    model = cached(checkpoint, cache)
    model.remember("it", {"a": 1}, lambda: answer)
    found = model.remember("it", {"a": 1}, never)
    assert all(torch.equal(found[name], tensor) for name, tensor in answer.items())


def test_a_key_is_what_it_holds_and_not_the_order_it_is_written_in():
    one = {"a": "x", "b": [1, 2.5, None]}
    assert digest(one) == digest(dict(reversed(one.items())))
    others = [one | {"a": "y"}, one | {"b": [2.5, 1, None]}, one | {"c": True}]
    assert len({digest(one), *map(digest, others)}) == 4


def test_an_answer_of_an_unknown_kind_is_computed_again(checkpoint, cache):
    model = cached(checkpoint, cache)
    model.remember("it", {"a": 1}, lambda: ANSWER, (Answer,))
    assert model.remember("it", {"a": 1}, lambda: "afresh") == "afresh"


def test_without_a_folder_nothing_is_remembered(checkpoint, tmp_path, computed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nothing = Cache(None)
    model = cached(checkpoint, nothing)
    assert [model.remember("it", {}, lambda i=i: i) for i in range(2)] == [0, 1]
    read(checkpoint, nothing)
    read(checkpoint, nothing)
    assert sum(computed) == 2 * len(PROMPTS)
    assert nothing.holdings() == {}
    assert nothing.clear() == 0
    assert [*tmp_path.iterdir()] == []


# --- the folder -----------------------------------------------------------------------------------


def test_the_default_folder_is_where_the_system_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv(storing.FOLDER_VARIABLE, str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv(storing.FOLDER_VARIABLE)
    assert default_folder().name == "refusal_lens"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    if os.name == "posix" and os.uname().sysname == "Linux":
        assert default_folder() == tmp_path / "caches" / "refusal_lens"


def test_a_cache_tells_what_it_holds_and_clears_nothing_else(checkpoint, cache):
    read(checkpoint, cache)
    cached(checkpoint, cache).remember("it", {"a": 1}, lambda: ANSWER, (Answer,))
    shelf = files(cache)[0].parent
    (shelf / "by-a-dead-process.partial").write_bytes(b"half")
    strangers = [cache.folder / "mine.txt", cache.folder / "a" / "b" / "mine.safetensors"]
    strangers += [shelf / "mine.txt", shelf / "mine.safetensors", cache.folder / "a" / "x.partial"]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True, parents=True)
        stranger.write_text("keep")
    held = cache.holdings()
    assert held.keys() == {f"{checkpoint}, float32", "other results"}
    n_files, n_prompts, n_bytes = held[f"{checkpoint}, float32"]
    assert (n_files, n_prompts) == (3, len(PROMPTS))
    assert held["other results"][0] == 1
    assert cache.clear() == n_bytes + held["other results"][2] + len(b"half")
    assert {path for path in cache.folder.rglob("*") if path.is_file()} == {*strangers}
    assert cache.holdings() == {}


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="is a file: name a folder"):
        Cache(tmp_path / "cache")


def test_what_a_file_is_keyed_by_can_be_read_in_it(checkpoint, cache):
    read(checkpoint, cache)
    with safe_open(files(cache)[0], "pt") as file:
        key = json.loads(file.metadata()["key"])
    assert key["model"] == str(checkpoint)
    assert key["dtype"] == "float32"
    assert {"refusal_lens", "transformer_lens", "torch", "transformers"} == set(key["versions"])


def test_a_run_beside_another_that_writes_the_same_reads_whole_files_alone(
    checkpoint, cache, monkeypatch, caplog
):
    """Another process's half-written file and its finished files are there while this one runs."""
    whole, _ = read(checkpoint, cache)
    shelf = files(cache)[0].parent
    finished = {path.name: path.read_bytes() for path in shelf.iterdir()}
    for path in shelf.iterdir():
        path.unlink()
    half = shelf / "other.partial"
    run_batch = extraction._run_batch

    def meanwhile(*arguments, **options):
        half.write_bytes(next(iter(finished.values()))[:100])
        for name, content in finished.items():
            (shelf / name).write_bytes(content)
        return run_batch(*arguments, **options)

    monkeypatch.setattr(extraction, "_run_batch", meanwhile)
    with caplog.at_level(logging.WARNING, logger=storing.__name__):
        beside, _ = read(checkpoint, cache)
    assert torch.equal(beside, whole)
    assert [record for record in caplog.records if record.name == storing.__name__] == []
    assert {path.name for path in shelf.iterdir()} == {half.name, *finished}
    assert half.stat().st_size == 100
