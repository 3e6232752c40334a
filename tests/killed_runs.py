"""Real runs, killed with SIGKILL at random moments and then resumed: `killed_runs.py FOLDER N SEED`.

Every run is a fork of this process, which has done the imports and nothing else, so that the time
of a run is that of its work. Prints one JSON
object: how long an undisturbed run took, and of each killed run what it left and what the resumed
one then did.
"""

import json
import os
import pickle
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import refusal_lens as rl
from refusal_lens.activations import batching as reading
from refusal_lens.activations import disk as artifacts
from refusal_lens.activations.store import Cache
from refusal_lens.experiment.lazy_model import LazyModel

CONTRASTS = ("refusal", "negativity", "positivity", "alarm")
BATCH_SIZE = 48


def run(cache: Path, out: Path) -> None:
    """The run itself; leaves its results' bits and how many prompts it computed in `out`."""
    computed = 0
    forward = reading._forward

    def counted(model, rows, batch, prefix):
        nonlocal computed
        computed += len(batch)
        return forward(model, rows, batch, prefix)

    reading._forward = counted
    contrasts = [rl.load_contrast(name) for name in CONTRASTS]
    found = rl.extract(
        LazyModel("organism:specific"),
        contrasts,
        batch_size=BATCH_SIZE,
        progress=False,
        cache=Cache(cache),
    )
    out.write_bytes(pickle.dumps((artifacts_bits(found), computed)))


def artifacts_bits(value) -> dict[str, bytes]:
    tree, tensors = artifacts.pack(value)
    bits = {path: tensor.contiguous().numpy().tobytes() for path, tensor in tensors.items()}
    return bits | {"tree": json.dumps(tree, sort_keys=True).encode()}


def start(cache: Path, out: Path) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(cache, out)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def stored(cache: Path) -> int:
    return sum(holding.n_prompts for holding in Cache(cache).holdings())


def main(folder: Path, n: int, seed: int) -> None:
    torch.set_num_threads(1)
    import transformer_lens  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    # Its hash of the source is kept, so that editing a file meanwhile is not another version.
    _ = LazyModel("organism:specific").identity
    out, moments = folder / "out", random.Random(seed)
    began = time.monotonic()
    os.waitpid(start(folder / "undisturbed", out), 0)
    whole = time.monotonic() - began
    undisturbed, n_prompts = pickle.loads(out.read_bytes())
    kills = []
    for i in range(n):
        out.unlink(missing_ok=True)
        cache = folder / f"killed-{i}"
        child = start(cache, out)
        moment = whole * (i + moments.random()) / n
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = stored(cache)
        _, status = os.waitpid(start(cache, out), 0)
        found, computed = pickle.loads(out.read_bytes()) if status == 0 else ({}, 0)
        kills.append(
            {
                "moment": moment,
                "left": left,
                "computed": computed,
                "status": status,
                "same": found == undisturbed,
            }
        )
    print(json.dumps({"seconds": whole, "n_prompts": n_prompts, "kills": kills}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
