"""Reading activations, side by side: `python tests/benchmarks/extraction.py`.

A random-weight Llama of about 150 M parameters with Llama-3's own vocabulary, on the CPU in
float32, and the bundled prompts; or, with `--directory`, the model kept there, on a GPU if there is
one: `gpu_8b.py --directory` makes one of Llama-3-8B's true shape. Each contestant's vectors are
compared with Hugging Face run on one prompt at a time before its time counts. The contestants take
turns, so that what else the machine does hits all alike; seconds are medians over the rounds, and
"ours is faster" the median over the rounds of the two times' ratio.

`--peers-python` names an interpreter that has `steering-vectors`, `repeng` and `nnsight`; without
it those are left out. `--out` writes the table as markdown.
"""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import tyro
from gpu_8b import Memory, rounding_bound, synchronise
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from llama3 import llama3_tokenizer

from refusal_lens.activations.extract import get_prompt_activations, read_residual_stream
from refusal_lens.models.load import load_model
from refusal_lens.prompts.contrast import BUNDLED, load_contrast
from refusal_lens.prompts.protocol import Protocol
from refusal_lens.prompts.tokenize import ChatInputs, build_inputs_with_chat_template

SYSTEM_PROMPTS = {
    "": None,
    "Llama-3.1's default": (
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"  # what its template writes
    ),
    "Llama-2's": (
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as "
        "possible, while being safe. If a question does not make any sense, or is not factually "
        "coherent, explain why instead of answering something not correct."
    ),
}
"""By the name that the table shows; the empty one is none."""
TOLERANCE = 1e-5
"""Of float32; `gpu_8b.rounding_bound` says what bfloat16 allows."""
COMPARED = 96
"""Prompts on which Hugging Face is run one at a time."""


@dataclass
class Contestant:
    name: str
    run: Callable[[], Tensor | None]
    """Activations `[prompt layer d_model]`, or None where it only marks the limit."""
    required: float | None = None
    """How many times as fast as this one ours must be."""
    system: str = ""
    """The name of its system prompt."""
    last_before_norm: bool = True
    """Whether it reads the last layer where TransformerLens does; else that one is not compared."""
    clock: Callable[[], float] | None = None
    """What its last run took, where it is timed in another process."""
    seconds: list[float] = field(default_factory=list)
    error: float | None = None


def main(
    *,
    prompts: int = 96,
    rounds: int = 5,
    threads: int = 2,
    directory: Path | None = None,
    peers_python: Path | None = None,
    out: Path | None = None,
) -> None:
    """Run all contestants and print the table.

    Args:
        prompts: how many of the bundled prompts to read.
        rounds: how often each contestant runs.
        threads: how many cores to use.
        directory: a Llama to read, in bfloat16 on a GPU if there is one; made for the run unless
            given.
        peers_python: an interpreter with the other packages.
        out: a markdown file to write.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if directory and torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        model_dir = directory or save_model(Path(folder) / "model")
        bench = Bench(model_dir, bundled_prompts(prompts), threads, device)
        contestants = bench.contestants()
        if peers_python:
            contestants += bench.peers(peers_python, Path(folder))
        extra = {
            system: bench.peak_on_gpu(system)
            if device.type == "cuda"
            else peak_memory(model_dir, prompts, threads, system)
            for system in SYSTEM_PROMPTS
        }
        bench.check(contestants)
        for _ in range(rounds):
            for contestant in contestants:
                start = time.perf_counter()
                contestant.run()
                took = time.perf_counter() - start
                contestant.seconds.append(contestant.clock() if contestant.clock else took)
        bench.close()
    table = report(contestants, prompts, rounds, bench, extra)
    print(table)
    if out:
        out.write_text(table)


def save_model(folder: Path) -> Path:
    """148 M parameters, half of them the vocabulary's, as a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=128_000,
        eos_token_id=128_009,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    llama3_tokenizer().save_pretrained(folder)
    # Where transformers 4 looks for the rotary base, for the peers that still need it.
    saved = json.loads((folder / "config.json").read_text()) | {"rope_theta": 500_000.0}
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def bundled_prompts(count: int) -> list[str]:
    contrasts = [load_contrast(name) for name in BUNDLED]
    every = [p for c in contrasts for pair in zip(c.target, c.baseline, strict=True) for p in pair]
    step = len(every) / count
    return [every[int(i * step)] for i in range(count)]


class Bench:
    """One model, held once, read by all contestants of this process."""

    def __init__(self, model_dir: Path, prompts: list[str], threads: int, device: torch.device):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model_dir, self.prompts, self.threads = model_dir, prompts, threads
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.hf = AutoModelForCausalLM.from_pretrained(model_dir, dtype=self.dtype).eval()
        self.hf = self.hf.to(device)
        self.lens = load_model(str(model_dir), device=device, dtype=self.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
        self.tokenizer.pad_token = "<|eot_id|>"
        self.protocols = {n: Protocol(system_prompt=text) for n, text in SYSTEM_PROMPTS.items()}
        self.peers_process: subprocess.Popen[str] | None = None
        self.peer_seconds = 0.0

    def texts(self) -> list[str]:
        return [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in self.prompts
        ]

    def contestants(self) -> list[Contestant]:
        return [
            Contestant("refusal_lens", lambda: self.ours("")),
            Contestant(
                "(a) output_hidden_states, batch 2",
                lambda: self.published(2),
                required=3.0,
                last_before_norm=False,
            ),
            Contestant(
                "(b) output_hidden_states, batch 16",
                lambda: self.published(16),
                required=1.5,
                last_before_norm=False,
            ),
            Contestant("(c) run_with_cache, no filter, batch 16", self.cache_all, required=1.5),
            Contestant("(d) bare forward, nothing read", self.bare(""), required=0.9),
            *(each for name in SYSTEM_PROMPTS if name for each in self.with_system(name)),
        ]

    def with_system(self, name: str) -> list[Contestant]:
        """Templates that write a system prompt of their own make every prompt longer."""
        bare = f"(d) bare forward, system prompt {name}"
        return [
            Contestant(f"refusal_lens, system prompt {name}", lambda: self.ours(name), system=name),
            Contestant(bare, self.bare(name), required=1.5, system=name),
        ]

    def ours(self, system: str) -> Tensor:
        protocol = self.protocols[system]
        return get_prompt_activations(self.lens, self.prompts, protocol=protocol, progress=False)[
            :, 0
        ]

    @torch.no_grad()
    def published(self, batch_size: int) -> Tensor:
        """The published experiment's loop, but padded on the left, where the last token is."""
        rows = []
        texts = self.texts()
        for start in range(0, len(texts), batch_size):
            inputs = self.tokenizer(
                texts[start : start + batch_size],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            ).to(self.device)
            states = self.hf(**inputs, output_hidden_states=True).hidden_states
            rows.append(torch.stack([state[:, -1] for state in states[1:]], dim=1).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def cache_all(self) -> Tensor:
        rows = []
        for start in range(0, len(self.prompts), 16):
            inputs = build_inputs_with_chat_template(
                self.lens.tokenizer, self.prompts[start : start + 16]
            )
            _, cached = self.lens.run_with_cache(inputs.tokens, attention_mask=inputs.mask)
            names = [f"blocks.{layer}.hook_resid_post" for layer in range(self.lens.cfg.n_layers)]
            rows.append(torch.stack([cached[name][:, -1] for name in names], dim=1).cpu())
        return torch.cat(rows)

    def bare(self, system: str) -> Callable[[], None]:
        """Hugging Face's base model over the very batches that ours makes."""
        protocol = self.protocols[system]
        inputs = build_inputs_with_chat_template(self.tokenizer, self.prompts, protocol=protocol)
        batches = []
        for rows, _ in read_residual_stream(self.lens, inputs, progress=False):
            width = int(inputs.mask[rows].sum(1).max())
            batches.append((inputs.tokens[rows, -width:], inputs.mask[rows, -width:]))

        @torch.no_grad()
        def run() -> None:
            for tokens, mask in batches:
                self.hf.model(
                    tokens.to(self.device), attention_mask=mask.to(self.device), use_cache=False
                )
            synchronise(self.device)

        return run

    def peak_on_gpu(self, system: str) -> float:
        """Bytes of device memory that reading adds at its peak, over those of the weights."""
        weights = sum(weight.numel() * weight.element_size() for weight in self.lens.parameters())
        memory = Memory(self.device)
        self.ours(system)
        return memory.extra()[1] / weights

    def peers(self, python: Path, folder: Path) -> list[Contestant]:
        (folder / "texts.json").write_text(json.dumps(self.texts()))
        script = Path(__file__).with_name("peers.py")
        command = [python, script, self.model_dir, folder / "texts.json", folder, self.threads]
        self.peers_process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        found = []
        for name in ("steering-vectors", "repeng", "nnsight"):
            reply = self.ask_peer(name)
            if "missing" in reply:
                print(f"{name} is left out: {reply['missing']}", file=sys.stderr)
                continue
            contestant = Contestant(
                f"{name} {reply['version']}",
                partial(self.peer, name, folder),
                required=1.5,
                last_before_norm=name != "repeng",
                clock=lambda: self.peer_seconds,
            )
            found.append(contestant)
        return found

    def ask_peer(self, name: str) -> dict:
        to_peers, from_peers = self.peers_process.stdin, self.peers_process.stdout
        to_peers.write(name + "\n")
        to_peers.flush()
        return json.loads(from_peers.readline())

    def peer(self, name: str, folder: Path) -> Tensor:
        self.peer_seconds = self.ask_peer(name)["seconds"]
        return torch.load(folder / f"{name}.pt", weights_only=True)

    def close(self) -> None:
        if self.peers_process:
            self.peers_process.communicate()

    def check(self, contestants: list[Contestant]) -> None:
        """Compare every contestant with Hugging Face run on one prompt at a time."""
        expected = {system: self.one_at_a_time(system) for system in SYSTEM_PROMPTS}
        for contestant in contestants:
            answer = contestant.run()
            if answer is None:
                continue
            compared = slice(None) if contestant.last_before_norm else slice(-1)
            right = expected[contestant.system][:, compared]
            difference = answer[: len(right), compared].float() - right
            error = difference.norm(dim=-1) / right.norm(dim=-1)
            contestant.error = float(error.max())
            if not (error < self.tolerance[compared]).all():
                raise SystemExit(f"{contestant.name} is off by {contestant.error:.1e}: not counted")

    @property
    def tolerance(self) -> Tensor:
        """The largest error allowed at each layer."""
        n_layers = self.lens.cfg.n_layers
        if self.dtype == torch.float32:
            return torch.full((n_layers,), TOLERANCE)
        return rounding_bound(n_layers)

    @torch.no_grad()
    def one_at_a_time(self, system: str) -> Tensor:
        streams: list[Tensor] = []
        hooks = [
            block.register_forward_hook(
                lambda module, args, out: streams.append(
                    (out[0] if isinstance(out, tuple) else out)[0, -1].float().cpu()
                )
            )
            for block in self.hf.model.layers
        ]
        inputs: ChatInputs = build_inputs_with_chat_template(
            self.tokenizer,
            self.prompts[:COMPARED],
            protocol=self.protocols[system],
        )
        for tokens, mask in zip(inputs.tokens, inputs.mask, strict=True):
            self.hf.model(tokens[mask.bool()][None].to(self.device), use_cache=False)
        for hook in hooks:
            hook.remove()
        return torch.stack(streams).unflatten(0, (len(inputs.tokens), -1))


def peak_memory(model_dir: Path, prompts: int, threads: int, system: str) -> float:
    """Bytes that reading needs at its peak beyond the model and the answer, over the weights'."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import extraction; "
        "extraction.measure_memory(sys.argv[2], *map(int, sys.argv[3:]))"
    )
    here = str(Path(__file__).parent)
    numbers = map(str, (prompts, threads, [*SYSTEM_PROMPTS].index(system)))
    answer = subprocess.run(
        [sys.executable, "-c", code, here, str(model_dir), *numbers],
        capture_output=True,
        text=True,
        check=True,
    )
    extra, weights = json.loads(answer.stdout.splitlines()[-1])
    return extra / weights


def measure_memory(model_dir: str, prompts: int, threads: int, system: int) -> None:
    import psutil

    torch.set_num_threads(threads)
    model = load_model(model_dir, device="cpu", dtype=torch.float32)
    # Tied embeddings share their storage and count once.
    storages = {weight.untyped_storage().data_ptr(): weight for weight in model.parameters()}
    weights = sum(weight.untyped_storage().nbytes() for weight in storages.values())
    texts = bundled_prompts(prompts)
    # The file is mapped, not read: pages of the embedding that no earlier prompt touched would
    # count as the reading's own. And one prompt alone brings in what libraries set up once.
    for weight in model.parameters():
        weight.sum()
    protocol = Protocol(system_prompt=[*SYSTEM_PROMPTS.values()][system])
    get_prompt_activations(model, texts[:1], protocol=protocol, progress=False)
    # What loading freed is handed back, lest the reading find its memory there, uncounted.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    answer = get_prompt_activations(model, texts, protocol=protocol, progress=False)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps([peak * 1024 - before - answer.numel() * 4, weights]))


def report(
    contestants: list[Contestant], prompts: int, rounds: int, bench: Bench, extra: dict[str, float]
) -> str:
    if bench.device.type == "cuda":
        where = f"bfloat16 on one {torch.cuda.get_device_name(bench.device)}"
    else:
        where = f"float32 on {bench.threads} cores of a {platform.machine()} CPU"
    parameters = sum(weight.numel() for weight in bench.hf.parameters())
    ours = {c.system: c.seconds for c in contestants if not c.required}
    lines = [
        "# Reading activations",
        "",
        f"{prompts} of the bundled prompts, {rounds} rounds, {where}, a random-weight Llama of "
        f"{parameters / 1e6:,.0f} M parameters, vocabulary {bench.hf.config.vocab_size:,}. "
        + ", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "transformer_lens")
        )
        + f", Python {platform.python_version()}.",
        "",
        "| contestant | seconds | prompts/s | ours is faster | required | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for c in contestants:
        seconds = statistics.median(c.seconds)
        faster = required = ""
        if c.required:
            pairs = zip(c.seconds, ours[c.system], strict=True)
            ratio = statistics.median(theirs / mine for theirs, mine in pairs)
            faster = f"{ratio:.2f} x"
            required = f"{c.required} x: {'met' if ratio >= c.required else 'MISSED'}"
        error = "" if c.error is None else f"{c.error:.0e}"
        cells = c.name, f"{seconds:.2f}", f"{prompts / seconds:.1f}", faster, required, error
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Extra peak memory of ours, beyond the model and the answer: "
        + ", ".join(
            f"{share:.1%}{f' with {name}' if name else ''}" for name, share in extra.items()
        )
        + " of the weights"
        + (
            ""  # a GPU's free memory is used
            if bench.device.type == "cuda"
            else f" (required: at most 5 %, {'met' if max(extra.values()) <= 0.05 else 'MISSED'})"
        )
        + ".",
        "",
        "The error is relative, the largest over layers and the first "
        f"{min(prompts, COMPARED)} prompts, against Hugging Face on one prompt at a time; "
        "contestants that read the last layer after the final norm are compared without it.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
