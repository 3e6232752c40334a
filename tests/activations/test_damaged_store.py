"""Runs that are killed, disks that are full, folders that can't be written, files that are damaged."""

import errno
import json
import logging
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors import safe_open
from torch import Tensor

from refusal_lens.activations import store as storing
from refusal_lens.activations.store import Cache
from refusal_lens.experiment.cached_model import CachedModel
from refusal_lens.experiment.config import Config

PROMPTS = tuple(f"{'Well, ' * (i % 3)}what is {i} plus {i}?" for i in range(12))
BATCH_SIZE = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def undisturbed(checkpoint):
    return run(checkpoint, Cache(None))


def run(folder: Path, cache: Cache) -> Tensor:
    model = CachedModel(Config(model=str(folder), batch_size=BATCH_SIZE), cache)
    return model.prompt_activations(PROMPTS, progress=False)


def warnings_of_the_cache(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == storing.__name__]


def stored(cache: Cache) -> list[Path]:
    return sorted(cache.folder.glob("*/*"))


# --- kill -9 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_kills", "seed"), [(3, 0), pytest.param(20, 1, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_to_the_results_of_an_undisturbed_one(
    tmp_path, n_kills, seed
):
    script = Path(__file__).parents[1] / "killed_runs.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(n_kills), str(seed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["kills"]) == n_kills
    for kill in report["kills"]:
        assert kill["status"] == 0, done.stderr
        assert kill["same"], report
        assert kill["left"] + kill["computed"] == report["n_prompts"], report
    # The control: kills that all came before or after the work would show nothing. Three may miss.
    amid = [kill for kill in report["kills"] if 0 < kill["left"] < report["n_prompts"]]
    assert amid or n_kills < 20, report


# --- no room, no permission -----------------------------------------------------------------------


@contextmanager
def files_of_at_most(n_bytes: int):
    """A limit that the system itself enforces: a write beyond it fails."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_cuts_short_costs_one_warning_and_no_result(
    checkpoint, cache, undisturbed, caplog
):
    with files_of_at_most(500):
        values = run(checkpoint, cache)
    assert torch.equal(values, undisturbed)
    (warning,) = warnings_of_the_cache(caplog)
    assert "File too large" in warning
    assert "continues without storing" in warning
    assert stored(cache) == []


@pytest.mark.parametrize("n_stored", [0, 2])
def test_a_disk_that_fills_up_costs_one_warning_and_what_was_stored_stays(
    checkpoint, cache, undisturbed, computed, monkeypatch, caplog, n_stored
):
    write, written = Path.write_bytes, []

    def full(path, content):
        written.append(path)
        if len(written) > n_stored:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert torch.equal(run(checkpoint, cache), undisturbed)
    (warning,) = warnings_of_the_cache(caplog)
    assert "No space left on device" in warning
    assert len(stored(cache)) == n_stored
    monkeypatch.setattr(Path, "write_bytes", write)
    computed.clear()
    resumed = run(checkpoint, Cache(cache.folder))
    assert sum(computed) == len(PROMPTS) - n_stored * BATCH_SIZE
    assert torch.equal(resumed, undisturbed)
    model = CachedModel(Config(model=str(checkpoint)), cache)
    assert model.remember("it", {"a": 1}, lambda: 2) == 2
    assert len(warnings_of_the_cache(caplog)) == 1


def test_a_disk_that_is_really_full_too(checkpoint, undisturbed, tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small disk")
    try:
        assert torch.equal(run(checkpoint, Cache(disk / "cache")), undisturbed)
        (warning,) = warnings_of_the_cache(caplog)
        assert "No space left on device" in warning
        # What did fit is used, and the disk being full still takes nothing from the results.
        assert 0 < len([*disk.rglob("*.safetensors")]) < len(PROMPTS) / BATCH_SIZE
        assert [*disk.rglob("*.partial")] == []
        assert torch.equal(run(checkpoint, Cache(disk / "cache")), undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def read_only(folder: Path, monkeypatch) -> None:
    """No file can be made in the folder; for root, who may do everything, by a pretence."""
    folder.chmod(0o500)
    if os.geteuid() != 0:
        return
    opened = Path.open

    def refused(path, mode="r", *arguments, **options):
        if folder in path.parents and mode != "rb":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)


def test_a_read_only_cache_is_read_from_and_costs_one_warning_only_if_there_is_something_new(
    checkpoint, cache, undisturbed, computed, monkeypatch, caplog
):
    run(checkpoint, cache)
    removed, *kept = stored(cache)
    shelf = removed.parent
    assert torch.equal(run(checkpoint, Cache(cache.folder)), undisturbed)
    assert warnings_of_the_cache(caplog) == []
    removed.unlink()
    computed.clear()
    read_only(shelf, monkeypatch)
    assert torch.equal(run(checkpoint, Cache(cache.folder)), undisturbed)
    assert computed == [BATCH_SIZE]
    (warning,) = warnings_of_the_cache(caplog)
    assert "Permission denied" in warning
    assert stored(cache) == kept
    shelf.chmod(0o700)


def test_a_folder_that_can_t_be_made_costs_one_warning(checkpoint, tmp_path, undisturbed, caplog):
    (tmp_path / "file").write_text("")
    assert torch.equal(run(checkpoint, Cache(tmp_path / "file" / "cache")), undisturbed)
    (warning,) = warnings_of_the_cache(caplog)
    assert "Not a directory" in warning


# --- damage ---------------------------------------------------------------------------------------


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def header_alone(content: bytes) -> bytes:
    return content[: 8 + int.from_bytes(content[:8], "little")]


def a_flipped_bit_in_the_values(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]


def a_flipped_bit_in_a_row_s_name(content: bytes) -> bytes:
    at = content.index(b"data_offsets") - 60
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def a_header_said_to_be_huge(content: bytes) -> bytes:
    return (2**62).to_bytes(8, "little") + content[8:]


def a_header_of_brackets(content: bytes) -> bytes:
    return (10**5).to_bytes(8, "little") + b"[" * 10**5 + content


DAMAGE = [
    truncated,
    header_alone,
    a_flipped_bit_in_the_values,
    a_flipped_bit_in_a_row_s_name,
    a_header_said_to_be_huge,
    a_header_of_brackets,
    lambda content: b"",
    lambda content: b"\0" * len(content),
    lambda content: content[:5],
    lambda content: content + b"\0",
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_computed_again_and_never_read(
    checkpoint, cache, undisturbed, computed, damage
):
    run(checkpoint, cache)
    before = {path: path.read_bytes() for path in stored(cache)}
    assert len(before) == len(PROMPTS) / BATCH_SIZE
    for victim in before:
        victim.write_bytes(damage(before[victim]))
        computed.clear()
        assert torch.equal(run(checkpoint, Cache(cache.folder)), undisturbed)
        assert computed == [BATCH_SIZE]
        assert {path: path.read_bytes() for path in stored(cache)} == before
    for victim in before:
        victim.write_bytes(damage(before[victim]))
    computed.clear()
    assert torch.equal(run(checkpoint, Cache(cache.folder)), undisturbed)
    assert computed == [BATCH_SIZE] * len(before)


def test_any_one_flipped_bit_is_seen(checkpoint, cache, undisturbed):
    run(checkpoint, cache)
    victim = stored(cache)[0]
    content = victim.read_bytes()
    with safe_open(victim, "pt") as file:
        key, names = json.loads(file.metadata()["key"]), {*file.keys()}
    whole = cache.load(key)
    assert names < whole.keys()
    anywhere = random.Random(0)
    for _ in range(200):
        at, bit = anywhere.randrange(len(content)), anywhere.randrange(8)
        victim.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
        assert cache.load(key).keys() == whole.keys() - names
        assert not victim.exists()
    victim.write_bytes(content)
    assert cache.load(key).keys() == whole.keys()


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_result_is_computed_again(checkpoint, cache, caplog, damage):
    model = CachedModel(Config(model=str(checkpoint)), cache)

    def answer(value: float) -> float:
        return float(model.remember("it", {}, lambda: torch.full((50,), value))[0])

    assert [answer(1.0), answer(2.0)] == [1.0, 1.0]
    (victim,) = stored(cache)
    content = victim.read_bytes()
    victim.write_bytes(damage(content))
    assert [answer(3.0), answer(4.0)] == [3.0, 3.0]
    assert len(warnings_of_the_cache(caplog)) == 1


def test_a_damaged_file_is_reported_once(checkpoint, cache, caplog):
    run(checkpoint, cache)
    victim = stored(cache)[0]
    victim.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        run(checkpoint, cache)
    (warning,) = warnings_of_the_cache(caplog)
    assert str(victim) in warning
    run(checkpoint, cache)
    assert len(warnings_of_the_cache(caplog)) == 1
