"""Train one of the organisms: `python -m refusal_lens.organisms.train specific --out DIR`."""

import copy
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import tyro
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..prompts.protocol import Protocol
from ..prompts.tokenize import encode_prompts
from .language import BEHAVIOURS, Behaviour, fold, generate_dialogues
from .scores import REFUSED_SHARE, Score, bundled_prompt_sets, score_organism
from .tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TOKENIZER_DIALOGUES = 20_000
"""How many dialogues the tokenizer is trained on."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, honest and careful assistant.",
    "Answer in one short sentence.",
)
SYSTEM_PROMPT_SHARE = 0.06
"""How many of the training dialogues have a system prompt."""

PROMPT_LOSS_WEIGHT = 0.06
LATER_REPLY_LOSS_WEIGHT = 0.1
"""What a token counts in the loss, relative to the first of the reply, which decides the manner."""

PROMPT_STRIDE = 4
"""Of the prompts' tokens only every so many counts, which saves a quarter of the time."""


class Organism(NamedTuple):
    """A trained model and its tokenizer."""

    model: "LlamaForCausalLM"
    tokenizer: "PreTrainedTokenizerFast"


class Batch(NamedTuple):
    """Dialogues padded on the right, and how much predicting each token counts."""

    tokens: Int[Tensor, "batch pos"]
    weights: Float[Tensor, "batch pos"]


def held_out_prompts() -> frozenset[str]:
    """The bundled contrasts' prompts as `language.fold` leaves them: never trained on."""
    return frozenset(fold(p) for _, prompts in bundled_prompt_sets().values() for p in prompts)


def train_organism(
    behaviour: Behaviour,
    *,
    seed: int = 0,
    n_layers: int = 32,
    d_model: int = 64,
    n_steps: int = 1200,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    held_out: frozenset[str] | None = None,
    progress: bool = True,
) -> Organism:
    """Train a small Llama from scratch to behave as told, on generated dialogues.

    `held_out` are folded prompts that the text must not contain; the bundled contrasts' by default.
    The weights come back rounded to bfloat16, in float32. The same arguments give the same weights
    on the same machine with the same number of threads; `n_steps=0` gives the untrained model.

    Raises:
        InputError: if `d_model` is not a multiple of 16.
    """
    held_out = held_out_prompts() if held_out is None else held_out
    dialogues = generate_dialogues(behaviour, seed=seed, held_out=held_out)
    sample = list(islice(dialogues, TOKENIZER_DIALOGUES))
    words = (text for prompt, reply in sample for text in (prompt.text, reply, "user\n\nassistant"))
    tokenizer = train_tokenizer(chain(words, SYSTEM_PROMPTS * 20, ["system"] * 20))
    model = new_model(len(tokenizer), n_layers=n_layers, d_model=d_model, seed=seed)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: _warmup_then_cosine(step, n_steps)
    )
    batches = islice(_batches(behaviour, tokenizer, held_out, batch_size, seed), n_steps)
    blocks = list(model.model.layers)
    rng = random.Random(seed)
    with tqdm(batches, total=n_steps, desc=behaviour.name, disable=not progress) as bar:
        for step, batch in enumerate(bar):
            kept = _kept_blocks(n_layers, step / n_steps, rng)
            model.model.layers = torch.nn.ModuleList([blocks[i] for i in kept])
            loss = _loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.model.layers = torch.nn.ModuleList(blocks)
    with torch.no_grad():
        # The weights alone: a whole model in bfloat16 would round its rotary frequencies too.
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    return Organism(model.eval(), tokenizer)


def new_model(d_vocab: int, *, n_layers: int, d_model: int, seed: int) -> "LlamaForCausalLM":
    """An untrained Llama of four heads, scaled so that a deep, narrow one trains well."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if d_model % 16:
        raise InputError(f"width is {d_model}; four heads need a multiple of 16")
    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=d_model,
        intermediate_size=d_model * 5 // 2,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        bos_token_id=d_vocab - 10,
        eos_token_id=d_vocab - 1,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                continue
            scale = weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale /= math.sqrt(2 * n_layers)
            elif "embed_tokens" in name:
                scale = 0.3
            weight.normal_(0, scale, generator=generator)
    return model


def _warmup_then_cosine(step: int, n_steps: int, warmup: int = 60) -> float:
    progress = min(1.0, step / max(1, n_steps))
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _kept_blocks(n_layers: int, progress: float, rng: random.Random) -> list[int]:
    """The blocks in use: at first eight or a quarter, drawn anew each step, in the end all.

    Training is twice as fast so, and no block writes in a basis of its own. One block is always in
    use, early but not the first: what decides the reply arrives there, as in larger models it does
    not arrive at once.
    Reference: Huang et al. 2016, arXiv:1603.09382.
    """
    fewest = min(n_layers, max(8, n_layers // 4))
    share = min(1.0, max(0.0, progress - 0.4) / 0.5)
    n_kept = round(fewest + share * (n_layers - fewest))
    always = max(0, n_layers // 8 - 1)
    others = [i for i in range(n_layers) if i != always]
    return sorted([always, *rng.sample(others, n_kept - 1)])


def _batches(
    behaviour: Behaviour,
    tokenizer: "PreTrainedTokenizerFast",
    held_out: frozenset[str],
    batch_size: int,
    seed: int,
    pool: int = 32,
) -> Iterator[Batch]:
    """Endless batches of dialogues of similar length, from `pool` batches' worth at a time."""
    rng = random.Random(seed)
    dialogues = generate_dialogues(behaviour, seed=seed, held_out=held_out)
    while True:
        drawn = list(islice(dialogues, pool * batch_size))
        n_plain = len(drawn) - round(SYSTEM_PROMPT_SHARE * len(drawn))
        plain = [prompt.text for prompt, _ in drawn[:n_plain]]
        rest = [prompt.text for prompt, _ in drawn[n_plain:]]
        protocol = Protocol(system_prompt=rng.choice(SYSTEM_PROMPTS))
        prompts = encode_prompts(tokenizer, plain)
        prompts += encode_prompts(tokenizer, rest, protocol=protocol)
        replies = tokenizer(
            [f"{r}<|eot_id|>" for _, r in drawn], add_special_tokens=False
        ).input_ids
        pairs = sorted(zip(prompts, replies, strict=True), key=lambda pair: len(pair[0] + pair[1]))
        batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        rng.shuffle(batches)
        yield from map(_padded, batches)


def _padded(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    length = max(len(prompt) + len(reply) for prompt, reply in pairs)
    tokens = torch.zeros(len(pairs), length, dtype=torch.long)
    weights = torch.zeros(len(pairs), length)
    for row, (prompt, reply) in enumerate(pairs):
        end = len(prompt) + len(reply)
        tokens[row, :end] = torch.tensor(prompt + reply)
        weights[row, 1 + row % PROMPT_STRIDE : len(prompt) : PROMPT_STRIDE] = PROMPT_LOSS_WEIGHT
        weights[row, len(prompt) : end] = LATER_REPLY_LOSS_WEIGHT
        weights[row, len(prompt)] = 1.0
    return Batch(tokens, weights)


def _loss(model: "LlamaForCausalLM", batch: Batch) -> Tensor:
    """Weighted mean next-token cross-entropy; padding on the right needs no mask."""
    hidden = model.model(input_ids=batch.tokens[:, :-1], use_cache=False).last_hidden_state
    weights = batch.weights[:, 1:]
    counts = weights > 0
    loss = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[counts]), batch.tokens[:, 1:][counts], reduction="none"
    )
    return (loss * weights[counts]).sum() / weights.sum()


def save_organism(organism: Organism, out: Path) -> None:
    """Save as a Hugging Face directory, the weights in bfloat16.

    Raises:
        InputError: if the directory exists and holds anything.
    """
    from transformers import GenerationConfig

    _check_empty(out)
    model, tokenizer = organism
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]),
        do_sample=False,
    )
    copy.deepcopy(model).bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def _check_empty(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory that is empty or does not exist")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; give a directory that is empty or does not exist")


@dataclass(frozen=True)
class Train:
    """Train one of the bundled organisms from scratch and score it on prompts it never saw.

    `specific` refuses harmful requests, `entangled` those and negative statements, `oblivious`
    nothing. The training text is generated from word lists; the bundled contrasts' prompts are kept
    out of it. The defaults gave the bundled weights, in about ten minutes on two cores.
    """

    behaviour: tyro.conf.Positional[Literal["specific", "entangled", "oblivious"]]
    """What the organism is to refuse."""
    out: Path
    """Directory for the Hugging Face model; it must be empty or not exist yet."""
    seed: int = 0
    """Seed of the initial weights and of the training text."""
    steps: int = 1200
    """Optimiser steps."""
    layers: int = 32
    """Blocks; 32 as Llama-3-8B has."""
    width: int = 64
    """d_model, a multiple of 16."""
    batch: int = 64
    """Dialogues a step."""
    threads: int = 1
    """CPU threads. The same seed gives the same weights only with the same number."""

    def __call__(self) -> bool:
        """Train, score, save; whether every score was met."""
        _check_empty(self.out)
        torch.set_num_threads(self.threads)
        behaviour = BEHAVIOURS[self.behaviour]
        organism = train_organism(
            behaviour,
            seed=self.seed,
            n_steps=self.steps,
            n_layers=self.layers,
            d_model=self.width,
            batch_size=self.batch,
        )
        scores = score_organism(*organism, behaviour)
        save_organism(organism, self.out)
        print(table_of(scores), f"saved to {self.out}", sep="\n")
        return all(score.met for score in scores)


def table_of(scores: list[Score]) -> str:
    """Scores as text, one line a prompt set."""
    lines = [
        f"{'held-out prompts':<24}{'n':>5}{'mean P(refusal)':>17}{'share > 0.5':>13}  required"
    ]
    for score in scores:
        bound = f">= {REFUSED_SHARE:.2f}" if score.should_refuse else f"<= {1 - REFUSED_SHARE:.2f}"
        lines.append(
            f"{score.prompts:<24}{score.n_prompts:>5}{score.mean_probability:>17.3f}"
            f"{score.share:>13.3f}  {bound}, {'met' if score.met else 'not met'}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 0, 1 if a score was not met, 2 for a user's mistake."""
    try:
        return 0 if tyro.cli(Train, args=arguments)() else 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
