"""The time to sweep all layers' directions, against intervening with one direction at a time.

    python tests/benchmarks/interventions_sweep.py [organism:specific | random | DIRECTORY]

The reference is a plain loop: for each direction, all 64 prompts in one batch padded on the left,
hooked with `ablate_direction` or `add_direction`, next-token logits at the last position. `random` is
a random Llama of 8 layers, d_model 256 and a vocabulary of 32,000 (25 million parameters). Both ways
take turns, `--rounds` times; the fastest round of each counts. The table is written to `--out`.
"""

import argparse
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from refusal_lens.interventions import (
    RefusalTokens,
    ablate_direction,
    ablation_effects,
    add_direction,
    addition_effects,
    refusal_log_odds,
)
from refusal_lens.models.load import load_model, load_tokenizer
from refusal_lens.prompts.contrast import load_contrast
from refusal_lens.prompts.tokenize import build_inputs_with_chat_template

RESULTS = Path(__file__).parent / "results"
MOST_TIME, LARGEST = 0.4, 1e-4
TOKENS = RefusalTokens((40,), ("I",), "any token will do", 1.0, 0.0)


def random_llama(folder: Path) -> str:
    """A random Llama with an organism's tokenizer, saved in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.06,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer("organism:specific").save_pretrained(folder)
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="organism:specific")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    suffix = "_random" if options.model == "random" else ""
    out = options.out or RESULTS / f"interventions_sweep{suffix}.md"
    with tempfile.TemporaryDirectory() as folder:
        name = options.model if options.model != "random" else random_llama(Path(folder) / "model")
        model = load_model(name)
    contrast = load_contrast("refusal")
    prompts = contrast.target[:64]
    n_layers = model.cfg.n_layers
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(n_layers, model.cfg.d_model, generator=generator)
    inputs = build_inputs_with_chat_template(model.tokenizer, prompts)
    device = next(model.parameters()).device
    tokens, mask = inputs.tokens.to(device), inputs.mask.to(device)

    @torch.no_grad()
    def one_at_a_time(all_hooks):
        rows = []
        for hooks in all_hooks:
            logits = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
            rows.append(refusal_log_odds(logits[:, -1], TOKENS).cpu())
        return torch.stack(rows)

    layers = torch.arange(n_layers)
    both_ways = {
        "ablation": (
            lambda: one_at_a_time(ablate_direction(model, x) for x in directions),
            lambda: (
                ablation_effects(model, prompts, directions, score=TOKENS, progress=False).log_odds
            ),
        ),
        "addition": (
            lambda: one_at_a_time(
                add_direction(model, x, layer) for layer, x in enumerate(directions)
            ),
            lambda: (
                addition_effects(
                    model, prompts, directions, layers, score=TOKENS, progress=False
                ).log_odds
            ),
        ),
    }
    lines = [
        "# Interventions with the directions of all layers",
        "",
        f"`python tests/benchmarks/interventions_sweep.py {options.model}`: {n_layers} directions, "
        f"{len(prompts)} prompts, {torch.get_num_threads()} threads on {device.type}; fastest of "
        f"{options.rounds} rounds; torch {version('torch')}, transformer_lens "
        f"{version('transformer_lens')}.",
        "",
        "| | one at a time, s | together, s | ratio | largest difference |",
        "|---|---|---|---|---|",
    ]
    total, apart = [0.0, 0.0], 0.0
    for kind, ways in both_ways.items():
        seconds, found = [[], []], [None, None]
        for _ in range(options.rounds):
            for i, way in enumerate(ways):
                start = time.perf_counter()
                found[i] = way()
                seconds[i].append(time.perf_counter() - start)
        loop, sweep = (min(each) for each in seconds)
        total = [total[0] + loop, total[1] + sweep]
        difference = float((found[0] - found[1]).abs().max())
        apart = max(apart, difference)
        lines.append(
            f"| {kind} | {loop:.2f} | {sweep:.2f} | {sweep / loop:.2f} | {difference:.1e} |"
        )
    ratio = total[1] / total[0]
    met = ratio <= MOST_TIME and apart <= LARGEST
    lines += [
        f"| both | {total[0]:.2f} | {total[1]:.2f} | {ratio:.2f} | {apart:.1e} |",
        "",
        f"Refusal log-odds. Required: together at most {MOST_TIME} of one at a time, the same "
        f"numbers within {LARGEST:g}; {'met' if met else 'MISSED'}.",
        "",
    ]
    print("\n".join(lines))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
