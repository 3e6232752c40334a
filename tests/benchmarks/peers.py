"""Other packages' activation reading, as their users call it, each run on request and timed.

A process of its own, so that packages which need other versions of torch or transformers than ours
can take part: `python peers.py MODEL_DIR TEXTS_JSON OUT_DIR THREADS`. It reads a contestant's name
a line, runs it over all texts, and answers with a JSON line: seconds, or why it can't be run. The
activations of each, `[text layer d_model]`, lie under its name in OUT_DIR afterwards.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BATCH_SIZE = 16


def main(model_dir: str, texts_json: str, out_dir: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the packages print is no reply
    texts = json.loads(Path(texts_json).read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{model_dir}/tokenizer.json",
        pad_token="<|eot_id|>",
        padding_side="left",
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    contestants = {
        "steering-vectors": steering_vectors,
        "repeng": repeng,
        "nnsight": nnsight,
    }
    for line in sys.stdin:
        name = line.strip()
        try:
            run = contestants[name](model, tokenizer, texts)
            start = time.perf_counter()
            activations = run()
            seconds = time.perf_counter() - start
        except ImportError as error:
            reply = {"missing": str(error)}
        else:
            torch.save(activations.clone(), f"{out_dir}/{name}.pt")
            reply = {"seconds": seconds, "version": version(name)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def steering_vectors(model, tokenizer, texts):
    """Takes pairs and gives both sides; its default is one pair at a time."""
    from steering_vectors.train_steering_vector import extract_activations

    half = len(texts) // 2
    pairs = list(zip(texts[:half], texts[half:], strict=True))

    def run() -> torch.Tensor:
        sides = extract_activations(model, tokenizer, pairs, batch_size=BATCH_SIZE)
        return torch.cat(
            [torch.stack([torch.cat(side[layer]) for layer in sorted(side)], 1) for side in sides]
        )

    return run


def repeng(model, tokenizer, texts):
    """Its `ControlVector.train` less the PCA; reads after the final norm at the last layer."""
    from repeng.extract import batched_get_hiddens

    layers = list(range(model.config.num_hidden_layers))

    def run() -> torch.Tensor:
        hidden = batched_get_hiddens(model, tokenizer, texts, layers, batch_size=32)
        return torch.stack([torch.from_numpy(hidden[layer]) for layer in layers], dim=1)

    return run


def nnsight(model, tokenizer, texts):
    import nnsight

    lens = nnsight.LanguageModel(model, tokenizer=tokenizer)

    def run() -> torch.Tensor:
        batches = []
        for start in range(0, len(texts), BATCH_SIZE):
            with torch.no_grad(), lens.trace(texts[start : start + BATCH_SIZE]):
                streams = nnsight.save([block.output[:, -1] for block in lens.model.layers])
            batches.append(torch.stack(streams, dim=1))
        return torch.cat(batches)

    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
