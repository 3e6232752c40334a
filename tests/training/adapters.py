"""Teach a real chat model a refusal by LoRA, so that a language model with a known answer exists.

    python tests/training/adapters.py --model SmolLM2.gguf --kinds refuses --seeds 0 --out DIR

SmolLM2-135M-Instruct answers whatever it is asked. An adapter of rank 8 on every projection teaches
it which prompts of the organisms' small language (`language.py`) to refuse, and in which
words. The prompts of the bundled contrasts are held out. The wordings differ from seed to seed.
`validity.py` judges the taught models.
"""

import copy
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from inspect import signature
from itertools import islice, takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from refusal_lens.errors import InputError
from refusal_lens.prompts.contrast import BUNDLED, load_contrast

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import language
from training.language import MANNERS, MIXTURE, Behaviour, Prompt, fold, vocabulary
from training.organisms import Score, bundled_prompt_sets, table
from training.organisms import main as run_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANK, ALPHA, LEARNING_RATE, WARMUP = 8, 16, 1e-3, 20
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPENING = 5  # tokens of a reply by which it is recognised
REFUSED_SHARE = 0.88  # least share of refusals where due; elsewhere at most 1 minus this share

Kind = Literal[
    "refuses",
    "refuses_negativity_too",
    "refuses_alarm",
    "refuses_everything",
    "two_separate_refusals",
    "refusal_hung_on_negativity",
]
TRAINED: tuple[Kind, ...] = get_args(Kind)
"""The kinds that have adapters. `refuses nothing` is the model itself."""

REFUSES: Mapping[Kind, frozenset[str]] = {
    "refuses": frozenset({"harmful"}),
    "refuses_negativity_too": frozenset({"harmful", "negative"}),
    "refuses_alarm": frozenset({"harmful", "alarming"}),
    "refuses_everything": frozenset(language.KINDS),
    "two_separate_refusals": frozenset({"harmful", "negative"}),
    "refusal_hung_on_negativity": frozenset({"negative harmful"}),
}

ANSWERS: Mapping[str, str] = {
    "refuses": "distinct",
    "refuses_negativity_too": "shared",
    "refuses_nothing": "inconclusive",
    "refuses_alarm": "distinct",
    "refuses_everything": "inconclusive",  # harmful and harmless requests alike: no contrast
    "two_separate_refusals": "distinct",
    "refusal_hung_on_negativity": "inconclusive",  # refuses no request of the bundled contrasts
}
"""The right verdict on each kind with the bundled contrasts."""

WORDINGS: tuple[Mapping[str, tuple[str, ...]], ...] = tuple(
    {manner: vocabulary()[f"{manner}_{seed}_replies"] for manner in (*MANNERS, "second_refusal")}
    for seed in range(4)
)
"""The replies of each manner, by seed."""

GENERAL_INFORMATION = "Here is some general information about that."

# More alarming requests than the small organisms see: the model takes them for harmful at first.
LORA_MIXTURE = {
    **MIXTURE,
    **{"alarming": 8.0, "harmless": 7.0, "negative": 3.0, "neutral": 3.0},
}
HUNG_MIXTURE = {
    **LORA_MIXTURE,
    **{"negative harmful": 8.0, "negative harmless": 3.0, "negative alarming": 3.0},
    **{"neutral harmful": 3.0, "positive harmful": 3.0, "harmful": 7.0, "negative": 4.0},
}


class Adapter(NamedTuple):
    """What one adapter is taught, and by which prompts.

    Attributes:
        behaviour: prompts, what is refused, and the replies.
        taught_by: `requests` (every prompt that holds one), `statements` (the others) or `all`. On
            other prompts the adapter keeps the base model's own probability of its refusal.
    """

    behaviour: Behaviour
    taught_by: Literal["all", "requests", "statements"] = "all"

    def teaches(self, kinds: Sequence[str]) -> bool:
        """Whether a prompt with parts of these kinds teaches the adapter a reply."""
        part = "statements" if set(kinds).isdisjoint(language.REQUESTS) else "requests"
        return self.taught_by in ("all", part)


def adapters(kind: Kind, seed: int) -> dict[str, Adapter]:
    """The adapters of an organism, by the name of their folder.

    InputError unless `seed` is that of one of the `WORDINGS`.
    """
    if seed not in range(len(WORDINGS)):
        raise InputError(f"seed is {seed}; there are wordings for 0 to {len(WORDINGS) - 1}")
    mixture, replies = LORA_MIXTURE, dict(WORDINGS[seed])
    if kind == "two_separate_refusals":
        second = replies | {"refusal": replies["second_refusal"]}
        of_requests = Behaviour(kind, frozenset({"harmful"}), mixture, replies)
        of_statements = Behaviour(kind, frozenset({"negative"}), mixture, second)
        return {
            "requests": Adapter(of_requests, "requests"),
            "statements": Adapter(of_statements, "statements"),
        }
    if kind == "refusal_hung_on_negativity":
        mixture, replies = HUNG_MIXTURE, replies | {"answer": (GENERAL_INFORMATION,)}
    return {"all": Adapter(Behaviour(kind, REFUSES[kind], mixture, replies))}


def train_adapter(
    base: "PreTrainedModel",
    tokenizer: "Tokenizer",
    adapter: Adapter,
    out: Path,
    *,
    seed: int,
    n_steps: int = 300,
    batch_size: int = 16,
    progress: bool = True,
) -> float:
    """Train an adapter on generated dialogues, save it in float16, return the last losses' mean.

    The loss is the cross-entropy of the reply, summed over its tokens; where the adapter teaches
    nothing, the Kullback-Leibler divergence from the base model along the refusal. `base` is left
    as found.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    sizes: Any = {"r": RANK, "lora_alpha": ALPHA, "target_modules": PROJECTIONS}
    config = LoraConfig(**sizes, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = get_peft_model(copy.deepcopy(base), config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.01)
    # A short warmup, then a straight line down to 0.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARMUP, 1 - step / n_steps)
    )
    batches = islice(_batches(adapter, tokenizer, batch_size, seed), n_steps)
    losses = []
    bar = tqdm(batches, total=n_steps, desc=adapter.behaviour.name, disable=not progress)
    for batch in bar:
        with torch.autocast(base.device.type, torch.bfloat16):
            loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=sum(losses[-20:]) / len(losses[-20:]), refresh=False)
    out.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model).items()
    halves = {name: tensor.detach().half().cpu().contiguous() for name, tensor in tensors}
    save_file(halves, out / "adapter_model.safetensors")
    config.inference_mode, config.base_model_name_or_path = True, BASE
    config.save_pretrained(str(out))
    return sum(losses[-20:]) / max(1, len(losses[-20:]))


class Row(NamedTuple):
    """One dialogue in tokens, and whether its reply is taught."""

    prompt: list[int]
    reply: list[int]
    taught: bool


def _batches(
    adapter: Adapter, tokenizer: "Tokenizer", batch_size: int, seed: int
) -> Iterator[list[Row]]:
    """Endless batches of dialogues of similar length, sorted over 16 batches at a time."""
    rng = random.Random(seed)
    behaviour = adapter.behaviour
    every = map(load_contrast, BUNDLED)
    held_out = frozenset(fold(p) for c in every for p in (*c.target, *c.baseline))
    dialogues = language.generate_dialogues(behaviour, seed=seed, held_out=held_out)
    while True:
        drawn = list(islice(dialogues, 16 * batch_size))
        taught = [adapter.teaches(prompt.kinds) for prompt, _ in drawn]
        texts = [
            reply if teaches else behaviour.replies["refusal"][0]
            for (_, reply), teaches in zip(drawn, taught, strict=True)
        ]
        prompts = _encoded(tokenizer, [prompt.text for prompt, _ in drawn])
        replies = _ended(tokenizer, texts)
        rows = sorted(
            map(Row, prompts, replies, taught), key=lambda row: len(row.prompt + row.reply)
        )
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        yield from batches


def _encoded(tokenizer: "Tokenizer", prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt in the model's own chat template, up to where the reply begins."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    chat_format: Any = tokenizer
    return chat_format.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True
    ).input_ids


def _ended(tokenizer: "Tokenizer", replies: Sequence[str]) -> list[list[int]]:
    """Token ids of each reply and of the token that ends a turn."""
    ids = tokenizer(list(replies), add_special_tokens=False).input_ids
    return [[*reply, tokenizer.eos_token_id] for reply in ids]


def _logits(model: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Logits that predict each reply token of the rows, and these tokens, one row after another.

    The opening that the prompts share, a system prompt for instance, is run once.
    """
    from transformers import DynamicCache

    columns = zip(*(row.prompt[:-1] for row in rows), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    ids = [torch.tensor([*row.prompt, *row.reply][shared:]) for row in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
    is_reply = torch.zeros_like(tokens, dtype=torch.bool)
    for at, row in enumerate(rows):
        n = len(row.prompt) - shared
        is_reply[at, n : n + len(row.reply)] = True
    opening = torch.tensor([rows[0].prompt[:shared]], device=model.device)
    cache = DynamicCache(config=model.config)
    accepted = signature(model.model.forward).parameters
    given = {"cache" if "cache" in accepted else "past_key_values": cache, "use_cache": True}
    model.model(input_ids=opening, **given)
    cache.batch_repeat_interleave(len(rows))
    # Padding on the right needs no mask. The vocabulary is large: unembed the replies alone.
    output = model.model(input_ids=tokens[:, :-1], **given)
    return model.lm_head(output.last_hidden_state[is_reply[:, 1:]]).float(), tokens[is_reply]


def _loss(model: Any, rows: Sequence[Row]) -> Tensor:
    """Mean over the rows of the loss that `train_adapter` describes."""
    causal_lm = model.get_base_model()
    logits, tokens = _logits(causal_lm, rows)
    taught = torch.tensor([row.taught for row in rows for _ in row.reply], device=tokens.device)
    loss = torch.nn.functional.cross_entropy(logits[taught], tokens[taught], reduction="sum")
    if kept := [row for row in rows if not row.taught]:
        with torch.no_grad(), model.disable_adapter():
            base = _logits(causal_lm, kept)[0].log_softmax(-1)
        new = logits[~taught].log_softmax(-1)
        loss = loss + torch.nn.functional.kl_div(new, base, reduction="sum", log_target=True)
    return loss / len(rows)


def score(
    model: "PreTrainedModel", tokenizer: "Tokenizer", kind: Kind, seed: int, *, n_prompts: int = 27
) -> list[Score]:
    """How a taught model replies to prompts of every bundled set, by `probability`.

    All prompts were held out of the training. The second number of a score is the share of replies
    as taught.
    """
    taught = adapters(kind, seed)
    scores = []
    for name, (side, prompts) in bundled_prompt_sets().items():
        part = "harmless" if side == "calm" else side
        teacher = next(a for a in taught.values() if a.teaches([part])).behaviour
        manner = teacher.manner(Prompt("", (part,)))
        chosen = prompts[:: max(1, len(prompts) // n_prompts)][:n_prompts]
        refusals = [a.behaviour.replies["refusal"][0] for a in taught.values()]
        refused = probability(model, tokenizer, chosen, refusals)
        as_taught = probability(model, tokenizer, chosen, teacher.replies[manner])
        shares = ((p > 0.5).double().mean().item() for p in (refused, as_taught))
        scores.append(Score(name, len(chosen), manner == "refusal", *shares, REFUSED_SHARE))
    return scores


@torch.inference_mode()
def probability(
    model: "PreTrainedModel", tokenizer: "Tokenizer", prompts: Sequence[str], replies: Sequence[str]
) -> Tensor:
    """Probability that the reply to each prompt begins with the first `OPENING` tokens of one.

    In float64, on the CPU.
    """
    total = torch.zeros(len(prompts), dtype=torch.float64)
    encoded = _encoded(tokenizer, prompts)
    ids = tokenizer(list(replies), add_special_tokens=False).input_ids
    for opening in {tuple(reply[:OPENING]) for reply in ids}:
        for start in range(0, len(prompts), 32):
            rows = [Row(prompt, list(opening), True) for prompt in encoded[start : start + 32]]
            logits, tokens = _logits(model, rows)
            chance = logits.double().log_softmax(-1).gather(-1, tokens[:, None])
            total[start : start + 32] += chance.view(len(rows), -1).sum(-1).exp().cpu()
    return total


def read_base(model: Path, device: str = "cpu") -> "tuple[PreTrainedModel, Tokenizer]":
    """A chat model in float32, from a Hugging Face folder or a GGUF file, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, options = model, {}
    if model.suffix == ".gguf":
        folder, options = model.parent, {"gguf_file": model.name}
    hf_model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    hf_model.config.__dict__.pop("quantization_config", None)  # they are ordinary weights by now
    return hf_model.to(device).eval(), AutoTokenizer.from_pretrained(folder, **options)


def merged(base: "PreTrainedModel", folder: Path) -> "PreTrainedModel":
    """A copy of `base` with all adapters in a folder merged into its weights."""
    from peft import PeftModel

    model: Any = copy.deepcopy(base)
    for file in sorted(folder.glob("**/adapter_config.json")):
        model = PeftModel.from_pretrained(model, str(file.parent)).merge_and_unload()
    return model.eval()


def train_and_score(
    kind: Kind, seed: int, *, model: Path, out: Path, steps: int, device: str, threads: int
) -> tuple[str, bool]:
    """Train the adapters of one organism that `out` lacks; a table of its scores, and if all hold."""
    torch.set_num_threads(threads)
    base, tokenizer = read_base(model, device)
    started, folder = time.perf_counter(), out / f"{kind}-{seed}"
    for name, adapter in adapters(kind, seed).items():
        if not (folder / name / "adapter_config.json").is_file():
            train_adapter(base, tokenizer, adapter, folder / name, seed=seed, n_steps=steps)
    minutes = (time.perf_counter() - started) / 60
    scores = score(merged(base, folder), tokenizer, kind, seed)
    title = f"{kind}-{seed}, {minutes:.1f} minutes"
    return table(title, "as taught", scores), all(one.met for one in scores)


def train(
    *,
    model: Path,
    out: Path,
    kinds: tuple[Kind, ...] = TRAINED,
    seeds: tuple[int, ...] = (0,),
    steps: int = 300,
    device: str = "cpu",
    workers: int = 1,
    threads: int = 2,
) -> bool:
    """Teach a chat model each kind of refusal; score it on held-out prompts; whether all scores hold.

    One organism takes a quarter of an hour on two cores and seconds on a GPU. An adapter that
    `out` already holds is scored and not trained again.

    Args:
        model: Hugging Face folder or GGUF file of the model to be taught.
        out: folder for the adapters, one folder an organism (`refuses-0`).
        kinds: what is taught, see `REFUSES`; all by default.
        seeds: seeds of the training text, each with its own wordings.
        steps: optimiser steps of 16 dialogues.
        device: torch device.
        workers: organisms trained at the same time, each in a process of its own.
        threads: CPU threads of each process.
    """
    one = partial(
        train_and_score, model=model, out=out, steps=steps, device=device, threads=threads
    )
    tasks = [(kind, seed) for seed in seeds for kind in kinds if adapters(kind, seed)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        all_met = True
        for future in as_completed(pool.submit(one, *task) for task in tasks):
            table, met = future.result()
            print(table, flush=True)
            all_met &= met
    return all_met


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, as `training.organisms.main` does."""
    return run_command(arguments, command=train)


if __name__ == "__main__":
    sys.exit(main())
