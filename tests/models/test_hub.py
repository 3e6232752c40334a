"""Hub names: downloaded from a hub that this file runs, by processes that take it for real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from pretend_hub import COMMIT, PretendHub

from refusal_lens.errors import InputError
from refusal_lens.models.hub import find_checkpoint

FINE_TUNE = "someone/my-refusing-assistant"
GATED = "meta-llama/Meta-Llama-3-8B-Instruct"
TOKEN = "hf_aVerySecretToken"

LOAD = f"""
import torch
from refusal_lens.models.load import load_model, model_provenance
model = load_model({FINE_TUNE!r}, device="cpu", revision="main")
print(model_provenance(model)["revision"], tuple(model(torch.arange(5)[None]).shape))
"""

FIND_WEIGHTS = f"""
from refusal_lens.models.hub import find_checkpoint
print(find_checkpoint({FINE_TUNE!r}, ("*.json", "*.safetensors")).holds(("*.safetensors",)))
"""

FIND = """
import sys
from refusal_lens.errors import InputError
from refusal_lens.models.hub import find_checkpoint
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    try:
        print("found", find_checkpoint(name, revision=revision or None).revision)
    except InputError as error:
        print("refused", error)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with a fine-tune of a Llama and a gated model, the former with files nobody needs."""
    directory = write_checkpoint(tmp_path_factory.mktemp("hub") / "model", "llama 3.1")
    (directory / "original").mkdir()
    for useless in ("original/consolidated.00.pth", "consolidated.safetensors", "model.gguf"):
        (directory / useless).write_bytes(b"gigabytes")
    models = {FINE_TUNE: directory, GATED: directory, "someone/empty": directory / "original"}
    models["HuggingFaceTB/SmolLM2-135M-Instruct"] = directory
    with PretendHub(models, gated={GATED}, token=TOKEN) as hub:
        yield hub


def run(script: str, *arguments: str, home: Path, **environment: str):
    """Run a script in a process of its own, with a home for the hub's files that nobody shares."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env=keep | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | environment,
    )


def everything_under(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def test_a_fine_tune_off_transformer_lens_list_is_loaded_and_then_needs_no_network(hub, tmp_path):
    asked = len(hub.asked)
    loaded = run(LOAD, home=tmp_path, HF_ENDPOINT=hub.url)
    assert loaded.stdout == f"{COMMIT} (1, 5, 272)\n", loaded.stderr
    fetched = {path.name for path in tmp_path.rglob("*") if path.is_symlink() or path.is_file()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= fetched
    assert not {"consolidated.00.pth", "consolidated.safetensors", "model.gguf"} & fetched
    assert len(hub.asked) > asked
    again = run(FIND_WEIGHTS, home=tmp_path, HF_HUB_OFFLINE="1")
    assert again.stdout == "True\n", again.stderr


def test_smollm2_is_a_short_name(hub, tmp_path):
    done = run(FIND, "smollm2", "smollm3", home=tmp_path, HF_ENDPOINT=hub.url)
    found, unknown = done.stdout.splitlines()
    assert found == f"found {COMMIT}"
    assert unknown.startswith("refused")


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    wanted = ("someone/unheard-of", f"{FINE_TUNE}@v7", "someone/empty", FINE_TUNE)
    done = run(FIND, *wanted, home=tmp_path, HF_ENDPOINT=hub.url)
    unknown, revision, empty, found = done.stdout.splitlines()
    assert unknown.startswith("refused the hub has no model 'someone/unheard-of'")
    assert revision.startswith(f"refused {FINE_TUNE} has no revision 'v7'")
    assert empty.startswith("refused someone/empty on the hub holds no model")
    assert found == f"found {COMMIT}"


def test_a_gated_model_opens_to_its_token_and_to_no_other(hub, tmp_path):
    without = run(FIND, GATED, home=tmp_path / "without", HF_ENDPOINT=hub.url)
    assert "accept its conditions at https://huggingface.co/meta-llama" in without.stdout
    assert "HF_TOKEN" in without.stdout
    wrong = run(FIND, GATED, home=tmp_path / "wrong", HF_ENDPOINT=hub.url, HF_TOKEN="hf_other")
    assert wrong.stdout == without.stdout
    right = run(FIND, GATED, home=tmp_path / "right", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert right.stdout == f"found {COMMIT}\n"
    said = without.stdout + wrong.stdout + right.stdout + wrong.stderr + right.stderr
    assert TOKEN not in said
    assert "hf_other" not in said
    assert TOKEN.encode() not in everything_under(tmp_path)


def test_a_stored_login_opens_a_gated_model(hub, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    done = run(FIND, GATED, home=tmp_path, HF_ENDPOINT=hub.url)
    assert done.stdout == f"found {COMMIT}\n"


def test_without_network_a_name_never_fetched_is_refused_in_one_line(tmp_path):
    done = run(FIND, FINE_TUNE, home=tmp_path, HF_HUB_OFFLINE="1")
    assert done.stdout.startswith(f"refused {FINE_TUNE} has not been downloaded before")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("organism:unheard-of", "there is no organism 'unheard-of'"),
        ("./nowhere", "there is no directory ./nowhere"),
        ("~/a/b/c", "there is no directory ~/a/b/c"),
        ("two words", "'two words' is no model"),
        ("", "'' is no model"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused_without_asking_the_hub(name, complaint):
    with pytest.raises(InputError, match=complaint):
        find_checkpoint(name)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no model: it has no config\.json"):
        find_checkpoint(str(tmp_path))


def test_the_fingerprint_tells_weights_apart_and_knows_them_again(tmp_path):
    prints = [
        find_checkpoint(str(write_checkpoint(tmp_path / str(i), seed=seed))).fingerprint()
        for i, seed in enumerate((0, 0, 1))
    ]
    assert prints[0] == prints[1] != prints[2]
    config = tmp_path / "0" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1.0}))
    assert find_checkpoint(str(tmp_path / "0")).fingerprint() != prints[0]
