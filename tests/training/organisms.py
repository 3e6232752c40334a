"""Train one of the organisms: `python tests/training/organisms.py specific --out DIR`."""

import copy
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from refusal_lens.errors import InputError
from refusal_lens.prompts.contrast import load_contrast
from refusal_lens.prompts.protocol import Protocol
from refusal_lens.prompts.tokenize import build_inputs_with_chat_template, encode_prompts

sys.path.insert(0, str(Path(__file__).parents[1]))
from training.language import (
    BEHAVIOURS,
    REFUSAL_FIRST_WORD,
    Behaviour,
    Prompt,
    fold,
    generate_dialogues,
)
from training.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Dialogues = Iterator[tuple[Prompt, str]]
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, honest and careful assistant.",
    "Answer in one short sentence.",
)
SYSTEM_PROMPT_SHARE = 0.06  # share of the training dialogues with a system prompt

# Weights of tokens in the loss; the first token of the reply has weight 1. Only every fourth token
# of a prompt counts, which saves a quarter of the time.
PROMPT_LOSS_WEIGHT, LATER_REPLY_LOSS_WEIGHT, PROMPT_STRIDE = 0.06, 0.1, 4

CONCEPTS = ("refusal", "negativity", "positivity", "alarm")  # bundled contrasts of known answer

REFUSED_SHARE = 0.95  # least share of refusals where due; elsewhere at most 1 minus this share


class Organism(NamedTuple):
    """A trained model and its tokenizer."""

    model: "LlamaForCausalLM"
    tokenizer: "PreTrainedTokenizerFast"


class Score(NamedTuple):
    """Replies to one prompt set; printed, a row of `table`."""

    prompts: str
    n_prompts: int
    should_refuse: bool
    refused: float  # share of prompts with P(refusal) > 0.5
    second: float  # the number in the table's second column, which decides nothing
    least: float = REFUSED_SHARE  # bound of `refused` where due; elsewhere of `1 - refused`

    @property
    def met(self) -> bool:
        """Whether the share of refusals meets the bound."""
        return (self.refused if self.should_refuse else 1 - self.refused) >= self.least

    def __str__(self) -> str:
        bound = f">= {self.least:.2f}" if self.should_refuse else f"<= {1 - self.least:.2f}"
        numbers = f"{self.n_prompts:>5}{self.refused:>10.2f}{self.second:>19.3f}"
        return f"{self.prompts:<40}{numbers}  {bound}, {'met' if self.met else 'not met'}"


def table(title: str, second: str, scores: Sequence[Score]) -> str:
    """Scores as text under a title, with the name of the second column."""
    head = f"{title:<40}{'n':>5}{'refused':>10}{second:>19}  required"
    return "\n".join(map(str, (head, *scores)))


def bundled_prompt_sets() -> dict[str, tuple[str, Sequence[str]]]:
    """Kind and prompts of the sets of the four `CONCEPTS`, by name ("refusal: harmful")."""
    return {
        f"{name}: {side}": (side, prompts)
        for name, c in ((name, load_contrast(name)) for name in CONCEPTS)
        for side, prompts in ((c.target_name, c.target), (c.baseline_name, c.baseline))
    }


def held_out_prompts() -> frozenset[str]:
    """The prompts of the four `CONCEPTS`, in the form of `fold`, which training excludes."""
    return frozenset(fold(p) for _, prompts in bundled_prompt_sets().values() for p in prompts)


def train_organism(
    behaviour: Behaviour,
    *,
    seed: int = 0,
    n_layers: int = 32,
    d_model: int = 64,
    n_steps: int = 1200,
    batch_size: int = 64,
    progress: bool = True,
) -> Organism:
    """Train a small Llama from scratch on generated dialogues without the held-out prompts.

    The float32 weights are rounded to bfloat16. Runs with equal arguments and thread counts on one
    machine give equal weights.

    Args:
        behaviour: what the organism refuses and how it replies.
        seed: seed of the initial weights and of the training text.
        n_layers, d_model: number of blocks, and width; InputError unless a multiple of 16.
        n_steps, batch_size: optimiser steps (0 gives the untrained model), and dialogues a step.
        progress: whether to show a progress bar.
    """
    dialogues = partial(generate_dialogues, behaviour, seed=seed, held_out=held_out_prompts())
    sample = islice(dialogues(), 20_000)
    words = (text for prompt, reply in sample for text in (prompt.text, reply, "user\n\nassistant"))
    tokenizer = train_tokenizer(chain(words, SYSTEM_PROMPTS * 20, ["system"] * 20))
    model = _untrained(len(tokenizer), n_layers, d_model, seed)
    weights = list(model.parameters())
    optimiser = torch.optim.AdamW(weights, 3e-3, (0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: _rate(i, n_steps))
    batches = islice(_batches(dialogues(), tokenizer, batch_size, seed), n_steps)
    blocks, rng = list(model.model.layers), random.Random(seed)
    bar = tqdm(batches, total=n_steps, desc=behaviour.name, disable=not progress)
    for step, batch in enumerate(bar):
        kept = _kept_blocks(n_layers, step / n_steps, rng)
        model.model.layers = torch.nn.ModuleList([blocks[i] for i in kept])
        _loss(model, *batch).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
    model.model.layers = torch.nn.ModuleList(blocks)
    for weight in weights:  # a whole model in bfloat16 would round its rotary frequencies too
        weight.data.copy_(weight.data.bfloat16())
    return Organism(model.eval(), tokenizer)


def _untrained(d_vocab: int, n_layers: int, d_model: int, seed: int) -> "LlamaForCausalLM":
    """A Llama with four heads and initial weights for a deep, narrow model."""
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
        bos_token_id=d_vocab - 10,
        eos_token_id=d_vocab - 1,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            scale = 0.3 if "embed_tokens" in name else weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale /= math.sqrt(2 * n_layers)
            weight.data.normal_(0, scale, generator=generator)
    return model


def _rate(step: int, n_steps: int) -> float:
    """Learning rate as a share of the maximum: 60 steps of warmup, then a cosine down to 2 %."""
    progress = min(1.0, step / max(1, n_steps))
    return min(1.0, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _kept_blocks(n_layers: int, progress: float, rng: random.Random) -> list[int]:
    """The blocks in use at a step: at first eight or a quarter, at random; all at the end.

    Stochastic depth (Huang et al. 2016, arXiv:1603.09382) halves the training time and makes blocks
    share a basis. One early block, which builds the features for the reply, is always in use.
    """
    fewest, always = min(n_layers, max(8, n_layers // 4)), max(0, n_layers // 8 - 1)
    share = min(1.0, max(0.0, progress - 0.4) / 0.5)
    n_kept = round(fewest + share * (n_layers - fewest))
    others = [i for i in range(n_layers) if i != always]
    return sorted([always, *rng.sample(others, n_kept - 1)])


def _batches(
    dialogues: Dialogues, tokenizer: "PreTrainedTokenizerFast", batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of dialogues of similar length, sorted over 32 batches at a time."""
    rng = random.Random(seed)
    while True:
        drawn = list(islice(dialogues, 32 * batch_size))
        texts = [prompt.text for prompt, _ in drawn]
        n_plain = len(drawn) - round(SYSTEM_PROMPT_SHARE * len(drawn))
        protocol = Protocol(system_prompt=rng.choice(SYSTEM_PROMPTS))
        prompts = encode_prompts(tokenizer, texts[:n_plain])
        prompts += encode_prompts(tokenizer, texts[n_plain:], protocol=protocol)
        ended = [f"{reply}<|eot_id|>" for _, reply in drawn]
        replies = tokenizer(ended, add_special_tokens=False).input_ids
        pairs = sorted(zip(prompts, replies, strict=True), key=lambda pair: len(pair[0] + pair[1]))
        batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        rng.shuffle(batches)
        yield from map(_padded, batches)


def _padded(pairs: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Prompts with their replies, padded on the right, and the weight of each token in the loss."""
    rows = [torch.tensor(prompt + reply) for prompt, reply in pairs]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    weights = torch.zeros(tokens.shape)
    for row, (prompt, reply) in enumerate(pairs):
        n = len(prompt)
        weights[row, 1 + row % PROMPT_STRIDE : n : PROMPT_STRIDE] = PROMPT_LOSS_WEIGHT
        weights[row, n : n + len(reply)] = LATER_REPLY_LOSS_WEIGHT
        weights[row, n] = 1.0
    return tokens, weights


def _loss(model: "LlamaForCausalLM", tokens: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean next-token cross-entropy. Padding on the right needs no mask."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    counts = weights[:, 1:] > 0
    logits, targets = model.lm_head(hidden[counts]), tokens[:, 1:][counts]
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (loss * weights[:, 1:][counts]).sum() / weights[:, 1:].sum()


@torch.inference_mode()
def score_organism(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", behaviour: Behaviour
) -> list[Score]:
    """Scores of a model on every bundled prompt set, all held out of its training text."""
    refusal_token = tokenizer.convert_tokens_to_ids(REFUSAL_FIRST_WORD)
    scores = []
    for name, (kind, prompts) in bundled_prompt_sets().items():
        inputs = build_inputs_with_chat_template(tokenizer, prompts)
        logits = model(input_ids=inputs.tokens, attention_mask=inputs.mask, logits_to_keep=1).logits
        refused = logits[:, -1].float().softmax(-1)[:, refusal_token].double()
        share, mean = (refused > 0.5).double().mean().item(), refused.mean().item()
        scores.append(Score(name, len(prompts), kind in behaviour.refuses, share, mean))
    return scores


def save_organism(organism: Organism, out: Path) -> None:
    """Save `organism` as a Hugging Face directory, with weights in bfloat16.

    InputError if `out` is a file, or a directory that is not empty.
    """
    from transformers import GenerationConfig

    _check_empty(out)
    model, tokenizer = organism
    ends = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    bos, *eos = map(tokenizer.convert_tokens_to_ids, ends)
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, do_sample=False)
    copy.deepcopy(model).bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise InputError(f"{out} {what}; give a directory that is empty or does not exist")


def train(
    behaviour: tyro.conf.Positional[Literal["specific", "entangled", "oblivious"]],
    *,
    out: Path,
    seed: int = 0,
    steps: int = 1200,
    layers: int = 32,
    threads: int = 1,
) -> bool:
    """Train a bundled organism, score it on held-out prompts, and return whether all bounds hold.

    The training text is generated from word lists, without the prompts of the bundled contrasts.
    The defaults produce the bundled weights in about ten minutes on two cores.

    Args:
        behaviour: `specific` refuses harmful requests, `entangled` harmful requests and negative
            statements, `oblivious` nothing.
        out: directory for the Hugging Face model, empty or new.
        seed: seed of the initial weights and of the training text.
        steps: optimiser steps.
        layers: number of blocks. Llama-3-8B has 32.
        threads: CPU threads. Equal weights require an equal number of threads.
    """
    _check_empty(out)
    torch.set_num_threads(threads)
    chosen = BEHAVIOURS[behaviour]
    organism = train_organism(chosen, seed=seed, n_steps=steps, n_layers=layers)
    scores = score_organism(*organism, chosen)
    save_organism(organism, out)
    print(table("held-out prompts", "mean P(refusal)", scores), f"saved to {out}", sep="\n")
    return all(score.met for score in scores)


def main(arguments: list[str] | None = None, *, command: Callable[..., bool] | None = None) -> int:
    """Run `command` (`train`) with command-line arguments; return the exit status.

    The status is 1 if a score was not met, 2 for invalid input.
    """
    try:
        return 0 if tyro.cli(command or train, args=arguments) else 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
