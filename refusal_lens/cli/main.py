"""The command line: `refusal-lens demo | run | tokens | report | ...`."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import tyro

import refusal_lens as rl

from ..activations import disk
from ..experiment import distributed
from ..experiment.causal import smallest_set
from ..experiment.wording import WORDS, rule
from .commands import Compare, ConceptMap, Convert, Multiverse, Report, Select, StoredWork
from .options import (
    CacheOptions,
    ContrastOptions,
    Flag,
    Folder,
    ModelOptions,
    Number,
    ProtocolOptions,
    Text,
)
from .show import findings, show, table, verdict

ORGANISMS = {name: f"organism:{name}" for name in ("specific", "entangled", "oblivious")}
ADAPTERS = ("refuses", "refuses_negativity_too")  # of a real chat model
PROMPTS = tyro.conf.arg(metavar="PROMPT ...", help="One prompt or several.", help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class Demo(CacheOptions):
    """Run the experiment on the three bundled organisms, side by side.

    Needs no GPU, no token and no network. Each organism is a small model with a known answer: in
    one, `specific`, refusal is a mechanism of its own; `entangled` refuses everything negative; and
    the third, `oblivious`, never refuses. With `--real` a real chat model instead, by itself and as
    two bundled adapters teach it to refuse: SmolLM2-135M-Instruct, in a quarter of an hour.
    """

    real: Flag = False  # A real chat model instead; needs the model, and the extra `lora`.
    model: str = "smollm2"  # With --real: the model's hub name, directory or GGUF file.
    out: Path = Path("runs/demo")  # Folder for the results of each organism and one figure.
    max_prompts: Number = None  # Use only so many prompts of every set. Default: all.
    quiet: Flag = False  # Print nothing but the results.
    verbose: Flag = False  # Log progress and problems on stderr.

    def __call__(self) -> None:
        if distributed.is_main():
            disk.check_writable(self.out)
        progress = distributed.is_main() and not self.quiet
        models = ORGANISMS
        if self.real:
            models = {"untaught": self.model} | {a: f"{self.model}+{a}" for a in ADAPTERS}
        tasks = [partial(self._run, *each, progress) for each in models.items()]
        found = dict(zip(models, distributed.divide(tasks), strict=True))
        layer = next(iter(found.values())).layer
        curves = {name: run.similarities["refusal_vs_negativity"] for name, run in found.items()}
        title = "Refusal vs negativity in three models"
        figure = rl.plotting.cosine_by_layer(curves, highlight=layer, title=title)
        if distributed.is_main():
            with disk.whole_directory(self.out) as staging:
                (staging / "cosine_by_layer.html").write_text(rl.plotting.page(figure), "utf-8")
        rows = []
        for name, run in found.items():
            _, cosine, rule = run.table()[0]
            rows.append([name, run.verdict.answer, f"{cosine:+z.2f}", rule])
        head = ["model", "verdict", "cosine", "the published rule would say"]
        path = self.out / "cosine_by_layer.html"
        written = f"Written to {self.out}: open {path} and the report.html of each model"
        told = WORDS["demo"].format(never="untaught" if self.real else "oblivious")
        show(*map(verdict, found.values()), table(head, rows), told, written)

    def _run(self, name: str, model: str, progress: bool) -> "rl.Results":
        config = rl.Config(model, max_prompts=self.max_prompts)
        results = rl.run_experiment(config, progress=progress, cache=self.store)
        results.save(self.out / name)
        rl.write_report(results, self.out / name / "report.html")
        return results


@dataclass(frozen=True, kw_only=True)
class Run(CacheOptions, ProtocolOptions, ContrastOptions, ModelOptions):
    """Run the experiment on a model, by default Meta-Llama-3-8B-Instruct.

    Compares the refusal direction with the negativity direction at every layer, prints the published
    table at the highlighted layer and writes all results.
    Your own prompts: `--target mine.csv:harmful --baseline mine.csv:harmless`.
    """

    layer: Number = None  # Layer to highlight, from 0. Default: 20 of 32, or the same depth.
    controls: tuple[str, ...] = ("positivity", "alarm", "arousal")  # Contrasts to compare, too.
    position: str = "-1"  # Token to read: -1 is the last one; or last_prompt_token.
    revision: Text = None  # Branch, tag or commit on the hub.
    dtype: Text = None  # bfloat16, float32, ... Default: bfloat16 on a GPU.
    batch_size: Number = None  # Prompts in a forward pass. Default: what fits the free memory.
    seed: int = 0  # Seed of everything random.
    refusal_openings: Folder = None  # .txt with one opening of a refusal a line. Default: a list.
    resamples: int = 10_000  # Resamples for intervals and nulls.
    confidence: float = 0.95  # Confidence of every interval.
    interventions: Flag = True  # Only compare the directions: quick, but inconclusive.
    doses: Flag = False  # Also add and take away growing doses of both directions; slower.
    repeat: Folder = None  # A results.json to repeat exactly; ignores other options.
    explain: Flag = False  # Print every reason, and the rule with its thresholds.

    def __call__(self) -> None:
        config = rl.config_of(self.repeat) if self.repeat else self._config()
        fewest, needed = smallest_set(config.contrasts()), config.thresholds.min_prompts
        if fewest < needed and distributed.is_main() and not self.quiet:
            print(WORDS["few_prompts"].format(fewest=fewest, needed=needed), file=sys.stderr)
        out = replace(self, model=config.model).start()
        results = rl.run_experiment(config, progress=not self.quiet, cache=self.store)
        if distributed.is_main():
            results.save(out)
            rl.write_report(results, out / "report.html")
        written = f"Written to {out}: open {out / 'report.html'}"
        why = "\n".join(results.verdict_lines()), results.rule()
        show(*findings(results), *(why if self.explain else ()), written)

    def _config(self) -> "rl.Config":
        same = {f.name: getattr(self, f.name) for f in fields(rl.Config) if hasattr(self, f.name)}
        openings = self.refusal_openings and rl.load_prompts(self.refusal_openings)
        same |= {"n_resamples": self.resamples, "protocol": self.protocol(self.position)}
        same["refusal_openings"] = openings and tuple(map(str.strip, openings))
        return rl.Config(**same | self.concepts())


@dataclass(frozen=True)
class Tokens(ProtocolOptions):
    """Show every token of a formatted prompt, and the tokens whose activations are extracted."""

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, PROMPTS]
    model: str = "organism:specific"  # Hub name, directory or organism; only tokenizes.
    generation_prompt: Flag = True  # Leave out the header of the assistant's reply.
    position: tuple[str, ...] = ("-1",)  # Positions to read, as in `run --position`.
    revision: Text = None  # Branch, tag or commit on the hub.

    def __call__(self) -> None:
        from ..models.load import load_tokenizer

        protocol = self.protocol(*self.position, generation_prompt=self.generation_prompt)
        tokenizer = load_tokenizer(self.model, revision=self.revision)
        print(rl.show_tokens(tokenizer, list(self.prompt), protocol=protocol))


def main(arguments: list[str] | None = None) -> None:
    """Run one command; the exit status is 0, or 2 for a user's mistake."""
    commands: dict[str, Callable] = {"demo": Demo, "run": Run, "tokens": Tokens, "report": Report}
    commands |= {"compare": Compare, "convert": Convert, "sensitivity": Multiverse}
    commands |= {"select": Select, "atlas": ConceptMap, "cache": StoredWork}
    if (given := sys.argv[1:] if arguments is None else arguments) == ["--explain"]:
        return show(rule(rl.Config().thresholds))
    if given == ["--version"]:
        return print(f"refusal-lens {version('refusal_lens')}")
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="refusal-lens",
            description="Is refusal a mechanism of its own in a chat model, or general negativity? "
            "--explain prints the rule of the verdict, --version the version.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        quiet, verbose = (getattr(command, name, False) for name in ("quiet", "verbose"))
        with _log_on_stderr(quiet=quiet, verbose=verbose), distributed.command():
            command()
        sys.stdout.flush()
    except rl.InputError as error:
        print(f"refusal-lens: {_by_flags(str(error), command)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _by_flags(message: str, command: object) -> str:
    """Return an error in one line that names the command's options instead of Python's arguments."""
    message = re.sub(r", or None\b[^,:;]*", "", " ".join(message.split()))
    words = {"n_resamples": "resamples", "Protocol.positions": "position"}
    words |= {"as Protocol(chat_template=...), or ": "by ", "`contrast_from_file`": "--target"}
    for python, option in words.items():
        message = message.replace(python, option)
    message = re.sub(r"\bProtocol\.(\w+)", r"\1", message)
    for name in vars(command):
        named = rf"(?<![-\w]){name}(?= is | = | has )"
        message = re.sub(named, f"--{name}".replace("_", "-"), message)
    return message


@contextmanager
def _log_on_stderr(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Show the package's log on stderr: warnings, only errors if quiet, everything if verbose.

    The deprecation warnings of libraries stay off the terminal.
    """
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    logger, handler = logging.getLogger("refusal_lens"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("refusal-lens: %(message)s"))
    level = logger.level
    logger.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
