"""Runs that are killed with SIGKILL at random moments and resumed: `killed_runs.py FOLDER N SEED`.

Every run is a fork of this process, which has only done the imports, so that the time of a run is
the time of its work. Prints one JSON object: the seconds of an undisturbed run, and for each killed
run how many prompts it stored and how many the resumed run computed.
"""

import json
import os
import pickle
import random
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

import refusal_lens as rl
from refusal_lens.activations import extract as extraction
from refusal_lens.activations.extract import by_contrast
from refusal_lens.activations.store import Cache
from refusal_lens.experiment.cached_model import CachedModel

CONTRASTS = ("refusal", "negativity", "positivity", "alarm")
BATCH_SIZE = 48


def run(cache: Path, out: Path) -> None:
    """The run itself; leaves the bits of its results and the number of prompts it ran in `out`."""
    computed = 0
    run_batch = extraction._run_batch

    def counted(model, rows, batch, prefix):
        nonlocal computed
        computed += len(batch)
        return run_batch(model, rows, batch, prefix)

    extraction._run_batch = counted
    config = rl.Config(model="organism:specific", batch_size=BATCH_SIZE)
    model = CachedModel(config, Cache(cache))
    contrasts = {name: rl.load_contrast(name) for name in CONTRASTS}
    found = by_contrast(partial(model.prompt_activations, progress=False), contrasts)
    bits = {
        (name, side): rows.numpy().tobytes()
        for name, pair in found.items()
        for side, rows in pair._asdict().items()
    }
    out.write_bytes(pickle.dumps((bits, computed)))


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
    return sum(n_prompts for _, n_prompts, _ in Cache(cache).holdings().values())


def main(folder: Path, n: int, seed: int) -> None:
    torch.set_num_threads(1)
    import transformer_lens  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

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
