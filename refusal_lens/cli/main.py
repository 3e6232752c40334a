"""The command line: `refusal-lens demo | run | tokens | report | ...`."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

import refusal_lens as rl

from ..activations import disk
from ..activations.store import default_folder
from ..experiment import distributed
from .directions import Compare, Convert
from .options import Folder, ModelOptions, Number, ProtocolOptions, Text
from .results import Multiverse, Report, Select, StoredWork

ORGANISMS = ("specific", "entangled", "oblivious")
EXPLANATION = """
In `entangled` refusal is negativity, and the cosine is high. In `specific` refusal is a mechanism of
its own, and the cosine is low. `oblivious` never refuses, yet has a harmful direction and a cosine: a
cosine does not show that a model refuses. The verdict measures the effect of each direction.
"""


@dataclass(frozen=True)
class Demo:
    """Run the experiment on the three bundled organisms, side by side.

    Needs no GPU, no token and no network. Each organism is a small model with a known answer:
    `specific` has a refusal mechanism of its own, `entangled` refuses everything negative, and
    `oblivious` never refuses.
    """

    out: Path = Path("runs/demo")  # Folder for the results of each organism and one figure.
    max_prompts: Number = None  # Use only so many prompts of every set. Default: all.
    quiet: bool = False  # Print nothing but the results.
    verbose: bool = False  # Log progress and problems on stderr.

    def __call__(self) -> None:
        """Run the command."""
        from ..experiment.verdict import published_rule

        disk.check_writable(self.out)
        progress = distributed.is_main() and not self.quiet
        runs = distributed.divide([partial(self._run, name, progress) for name in ORGANISMS])
        layer, found = runs[0].layer, dict(zip(ORGANISMS, runs, strict=True))
        curves = {name: run.similarities["refusal_vs_negativity"] for name, run in found.items()}
        title = "Refusal vs negativity in the three organisms"
        figure = rl.plotting.cosine_by_layer(curves, highlight=layer, title=title)
        path = self.out / "cosine_by_layer.html"
        if distributed.is_main():
            with disk.whole_directory(self.out) as staging:
                page = figure.to_html(include_plotlyjs=True, full_html=True)
                (staging / path.name).write_text(page, "utf-8")
        print(*runs, "organism   verdict       cosine   published rule", sep="\n\n")
        for name, run in found.items():
            cosine = float(curves[name][layer])
            answer, rule = run.verdict.answer, published_rule(cosine)
            print(f"{name:<10} {answer:<13} {cosine:>+6.2f}   {rule}")
        print(EXPLANATION)
        print(f"Written to {self.out}: open {path} and the report.html of each organism")

    def _run(self, organism: str, progress: bool) -> "rl.Results":
        config = rl.Config(model=f"organism:{organism}", max_prompts=self.max_prompts)
        results = rl.run_experiment(config, progress=progress)
        results.save(self.out / organism)
        rl.write_report(results, self.out / organism / "report.html")
        return results


@dataclass(frozen=True, kw_only=True)
class Run(ProtocolOptions, ModelOptions):
    """Run the experiment on a model, by default Meta-Llama-3-8B-Instruct.

    Compares the refusal direction with the negativity direction at every layer, prints the published
    table at the highlighted layer and writes all results.
    Your own prompts: `--target mine.csv:harmful --baseline mine.csv:harmless`.
    """

    layer: Number = None  # Layer to highlight, from 0. Default: 20 of 32, or the same depth.
    refusal: str = "refusal"  # Bundled contrast of refusal.
    target: Text = None
    """Your own harmful prompts instead: a text file, FILE:COLUMN of a table, or a dataset,
    OWNER/NAME@SPLIT:COLUMN. :LABEL=VALUE after the column takes the rows with this label."""
    baseline: Text = None  # Your own harmless prompts; required with --target.
    against: str = "negativity"  # Bundled contrast to compare refusal with.
    against_target: Text = None  # Your own prompts for the other contrast, as with --target.
    against_baseline: Text = None  # Their baseline; required with --against-target.
    keep_duplicates: bool = False  # Count your own prompts as often as they stand on their side.
    controls: tuple[str, ...] = ("positivity", "alarm")  # Bundled contrasts to compare as well.
    position: str = "-1"  # Token to read: -1 is the last one; or last_prompt_token.
    revision: Text = None  # Branch, tag or commit on the hub.
    dtype: Text = None  # bfloat16, float32, ... Default: bfloat16 on a GPU.
    batch_size: Number = None  # Prompts in a forward pass. Default: what fits the free memory.
    seed: int = 0  # Seed of everything random.
    max_prompts: Number = None  # Use only so many prompts of every set. Default: all.
    refusal_openings: Folder = None  # File with one opening of a refusal a line. Default: a list.
    resamples: int = 10_000  # Resamples for intervals and nulls.
    confidence: float = 0.95  # Confidence of every interval.
    interventions: bool = True  # Only compare the directions: quick, but inconclusive.
    repeat: Folder = None  # A results.json to repeat exactly; ignores other options.
    cache: Folder = None  # Folder for finished work. Default: a folder among the user's caches.
    no_cache: bool = False  # Neither store nor use finished work.
    explain: bool = False  # Print the rule that decides, with its thresholds.

    def __call__(self) -> None:
        """Run the command."""
        config = rl.config_of(self.repeat) if self.repeat else self._config()
        config.contrasts()
        out = replace(self, model=config.model).folder()
        disk.check_writable(out)
        cache = rl.Cache(None if self.no_cache else self.cache or default_folder())
        results = rl.run_experiment(config, progress=not self.quiet, cache=cache)
        if distributed.is_main():
            results.save(out)
            rl.write_report(results, out / "report.html")
        written = f"Written to {out}: open {out / 'report.html'}"
        print(results, *[results.rule()] * self.explain, written, sep="\n\n")

    def _config(self) -> "rl.Config":
        same = {f.name: getattr(self, f.name) for f in fields(rl.Config) if hasattr(self, f.name)}
        keep = self.keep_duplicates
        refusal = _contrast("target", self.target, self.baseline, keep)
        against = _contrast("against-target", self.against_target, self.against_baseline, keep)
        different = {
            "refusal": refusal or self.refusal,
            "negativity": against or self.against,
            "protocol": self.protocol(self.position),
            "n_resamples": self.resamples,
            "refusal_openings": _openings(self.refusal_openings),
        }
        return rl.Config(**(same | different))


@dataclass(frozen=True)
class Tokens(ProtocolOptions):
    """Show every token of a formatted prompt, and the tokens whose activations are extracted."""

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional]  # One prompt or several.
    model: str = "organism:specific"  # Hub name, directory or organism; only tokenizes.
    generation_prompt: bool = True  # End with the header of the assistant's reply.
    position: tuple[str, ...] = ("-1",)  # Positions to read, as in `run --position`.
    revision: Text = None  # Branch, tag or commit on the hub.

    def __call__(self) -> None:
        """Run the command."""
        from ..models.load import load_tokenizer

        protocol = self.protocol(*self.position, generation_prompt=self.generation_prompt)
        tokenizer = load_tokenizer(self.model, revision=self.revision)
        print(rl.show_tokens(tokenizer, list(self.prompt), protocol=protocol))


def _contrast(
    flag: str, target: str | None, baseline: str | None, keep_duplicates: bool
) -> "rl.Contrast | None":
    """Return the contrast of a user's own prompts, if any."""
    if target and baseline:
        return rl.contrast_from_prompts(target, baseline, keep_duplicates=keep_duplicates)
    if target or baseline:
        raise rl.InputError(f"--{flag} and its baseline go together: give both")
    return None


def _openings(file: Path | None) -> tuple[str, ...] | None:
    """Return the lines of a user's file of refusal openings that are not blank."""
    if file is None:
        return None
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise rl.InputError(f"--refusal-openings {file} can't be read: {error}") from error
    if not (found := tuple(line.strip() for line in lines if line.strip())):
        raise rl.InputError(
            f"--refusal-openings {file} holds no opening: write one a line, such as I can't"
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run one command; the exit status is 0, or 2 for a user's mistake."""
    commands: dict[str, Callable] = {
        "demo": Demo,
        "run": Run,
        "tokens": Tokens,
        "compare": Compare,
        "convert": Convert,
        "report": Report,
        "sensitivity": Multiverse,
        "select": Select,
        "cache": StoredWork,
    }
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="refusal-lens",
        description="Is refusal a mechanism of its own in a chat model, or general negativity?",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    quiet, verbose = (getattr(command, name, False) for name in ("quiet", "verbose"))
    _quieten_third_parties(progress=not quiet)
    try:
        with _log_on_stderr(quiet=quiet, verbose=verbose), distributed.command():
            command()
        sys.stdout.flush()
    except rl.InputError as error:
        print(f"refusal-lens: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _log_on_stderr(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Show the package's log on stderr: warnings, only errors if quiet, everything if verbose."""
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


def _quieten_third_parties(*, progress: bool) -> None:
    """Keep the deprecation warnings of libraries off the terminal."""
    warnings.simplefilter("ignore")
    for variable in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    if not progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
