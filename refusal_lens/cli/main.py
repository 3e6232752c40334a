"""The command line: `refusal-lens demo | run | tokens | report | ...`."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..errors import InputError
from .directions import Compare, Convert
from .results import CacheCommand, Report, Select, Sensitivity, out_folder

if TYPE_CHECKING:
    from ..experiment.config import Config
    from ..experiment.distributed import Team
    from ..prompts.contrast import Contrast

ORGANISMS = ("specific", "entangled", "oblivious")

# tyro would show "{None}|STR" for an option that may be left out.
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Number = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


@dataclass(frozen=True)
class Demo:
    """Run the experiment on the three bundled organisms, side by side.

    Needs no GPU, no token and no network. Each organism is a small model, trained for this package,
    whose true answer is known: `specific` has a refusal mechanism of its own, `entangled` refuses
    whatever is negative, `oblivious` never refuses.
    """

    out: Path = Path("runs/demo")
    """Folder for the results: one folder an organism, and the figure of all three."""
    prompts: int = 48
    """Prompts to use of every set, so that it takes less than a minute; 108 is all of them."""
    quiet: bool = False
    """Print nothing but the results."""
    verbose: bool = False
    """Say on stderr what is being done, and what went wrong along the way."""

    def __call__(self) -> None:
        """Run it."""
        from .. import plotting
        from ..activations import disk as artifacts
        from ..experiment.config import Config
        from ..experiment.run import run_experiment
        from ..experiment.verdict import published_rule
        from ..report import write_report

        artifacts.check_writable(self.out)
        curves, said = {}, []
        for name in ORGANISMS:
            config = Config(model=f"organism:{name}", max_prompts=self.prompts)
            results = run_experiment(config, progress=not self.quiet)
            results.save(self.out / name)
            write_report(results, self.out / name / "report.html")
            print(results, end="\n\n")
            cosine = results.similarities["refusal_vs_negativity"]
            curves[name] = cosine
            value = float(cosine[results.layer])
            said.append(
                f"{name:<10} {results.verdict.answer:<13} {value:>+6.2f}   {published_rule(value)}"
            )
        figure = plotting.cosine_by_layer(
            curves, highlight=results.layer, title="Refusal vs negativity in the three organisms"
        )
        with artifacts.whole_directory(self.out) as staging:
            page = figure.to_html(include_plotlyjs=True, full_html=True)
            (staging / "cosine_by_layer.html").write_text(page, "utf-8")
        print(
            "organism   verdict       cosine   the published rule would say of it",
            *said,
            "",
            "What to look at. In `entangled` refusal is negativity, and its curve lies high; in "
            "`specific` refusal is a",
            "mechanism of its own, and its curve lies low. `oblivious` never refuses: it has a "
            "harmful direction and a",
            "curve all the same, so a cosine alone can't tell that a model refuses at all. The "
            "verdict can: it asks what",
            "each direction does when it is taken out or put in.",
            "",
            f"Written to {self.out}: open {self.out / 'cosine_by_layer.html'} for the curves, and each "
            "model's report.html",
            sep="\n",
        )


@dataclass(frozen=True)
class Run:
    """Run the experiment on a model, Meta-Llama-3-8B-Instruct unless told otherwise.

    Compares the refusal direction with the negativity direction at every layer, prints the
    published experiment's table at the highlighted layer and writes everything it found.
    Prompts of your own: `--target mine.csv:harmful --baseline mine.csv:harmless`.
    """

    model: str = "meta-llama/Meta-Llama-3-8B-Instruct"
    """A hub name, a local directory, or organism:specific, organism:entangled, organism:oblivious."""
    layer: Number = None
    """Layer to highlight (0 is the first block's output). Default: 20 of 32, else as deep."""
    out: Folder = None
    """Folder for the results. Default: runs/ and the model's name."""
    refusal: str = "refusal"
    """Bundled contrast whose direction is in question."""
    target: Text = None
    """Your own harmful prompts instead: FILE:COLUMN (CSV, JSON, JSONL) or a text file."""
    baseline: Text = None
    """Your own harmless prompts; goes with --target."""
    against: str = "negativity"
    """Bundled contrast that it is compared with."""
    against_target: Text = None
    """Your own prompts for the other contrast, as with --target."""
    against_baseline: Text = None
    """Goes with --against-target."""
    controls: tuple[str, ...] = ("positivity", "alarm")
    """Bundled contrasts compared with refusal in the same way."""
    system_prompt: Text = None
    """System prompt before every prompt. Default: none."""
    position: str = "-1"
    """Token to read, from the end of the formatted prompt (-1 the last), or last_prompt_token."""
    revision: Text = None
    """Branch, tag or commit on the hub."""
    device: Text = None
    """cuda, cpu, ... Default: the GPU where there is one."""
    dtype: Text = None
    """bfloat16, float32, ... Default: bfloat16 on a GPU."""
    batch_size: Number = None
    """Prompts a forward pass. Default: found from free memory."""
    seed: int = 0
    """Seed of everything random."""
    max_prompts: Number = None
    """Use only so many prompts of every set, for a quick look. Default: all."""
    resamples: int = 10_000
    """Resamples behind intervals and nulls."""
    confidence: float = 0.95
    """Of every interval."""
    interventions: bool = True
    """Only compare the directions, don't intervene: quick, but no verdict except inconclusive."""
    repeat: Folder = None
    """A results.json to repeat exactly: model, prompts, protocol, seed. Other options are ignored."""
    cache: Folder = None
    """Where to keep what was computed. Default: a folder among the system's caches."""
    no_cache: bool = False
    """Keep nothing, and use nothing that was kept."""
    quiet: bool = False
    """Print nothing but the results."""
    verbose: bool = False
    """Say on stderr what is being done, and what went wrong along the way."""

    def __call__(self) -> None:
        """Run it."""
        from ..activations import disk as artifacts
        from ..activations.store import Cache, default_folder
        from ..experiment import distributed
        from ..experiment.results import config_of
        from ..experiment.run import run_experiment
        from ..report import write_report

        team = distributed.join(self.device)
        if distributed.launched():
            distributed.speak_as(team)
        config = config_of(self.repeat) if self.repeat else self._config(team)
        config.contrasts()
        out = self.out or out_folder(config.model)
        if team.leads:
            artifacts.check_writable(out)
        results = run_experiment(
            config,
            progress=team.leads and not self.quiet,
            cache=Cache(None if self.no_cache else self.cache or default_folder()),
            team=team,
        )
        if team.leads:
            results.save(out)
            write_report(results, out / "report.html")
            print(results, "", results.verdict.rule, sep="\n")
            print(f"\nWritten to {out}: open {out / 'report.html'}")
        distributed.leave()

    def _config(self, team: "Team") -> "Config":
        from ..experiment.config import Config
        from ..prompts.protocol import Protocol

        device = self.device
        if device is None and team.count > 1:
            import torch

            device = f"cuda:{team.local_rank}" if torch.cuda.is_available() else "cpu"
        return Config(
            model=self.model,
            layer=self.layer,
            refusal=_own_contrast("target", self.target, self.baseline) or self.refusal,
            negativity=_own_contrast("against-target", self.against_target, self.against_baseline)
            or self.against,
            controls=self.controls,
            protocol=Protocol(
                system_prompt=self.system_prompt,
                positions=(_position(self.position),),
            ),
            revision=self.revision,
            device=device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            seed=self.seed,
            max_prompts=self.max_prompts,
            interventions=self.interventions,
            n_resamples=self.resamples,
            confidence=self.confidence,
        )


@dataclass(frozen=True)
class Tokens:
    """Show every token that a model is given for a prompt, and which one is read."""

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The prompt, or several."""
    model: str = "organism:specific"
    """A hub name, a local directory or an organism: only its tokenizer is loaded."""
    system_prompt: Text = None
    """System prompt before every prompt."""
    generation_prompt: bool = True
    """End with the header of the assistant's reply."""
    position: tuple[str, ...] = ("-1",)
    """Positions to read, as in `run --position`."""
    revision: Text = None
    """Branch, tag or commit on the hub."""

    def __call__(self) -> None:
        """Run it."""
        from ..models.load import load_tokenizer
        from ..prompts.protocol import Protocol
        from ..prompts.tokenize import show_tokens

        protocol = Protocol(
            system_prompt=self.system_prompt,
            generation_prompt=self.generation_prompt,
            positions=tuple(map(_position, self.position)),
        )
        tokenizer = load_tokenizer(self.model, revision=self.revision)
        print(show_tokens(tokenizer, list(self.prompt), protocol=protocol))


def _position(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _own_contrast(flag: str, target: str | None, baseline: str | None) -> "Contrast | None":
    if target is None and baseline is None:
        return None
    if target is None or baseline is None:
        raise InputError(f"--{flag} and its baseline go together: give both")
    from ..prompts.contrast import contrast_from_prompts

    return contrast_from_prompts(target, baseline)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit status 0, or 2 for a mistake of the user's."""
    commands: dict[str, Callable] = {
        "demo": Demo,
        "run": Run,
        "tokens": Tokens,
        "compare": Compare,
        "convert": Convert,
        "report": Report,
        "sensitivity": Sensitivity,
        "select": Select,
        "cache": CacheCommand,
    }
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="refusal-lens",
        description=(
            "Is the direction along which a chat model refuses harmful requests its own mechanism, "
            "or is it just negativity?"
        ),
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    quiet, verbose = (getattr(command, name, False) for name in ("quiet", "verbose"))
    _quieten_third_parties(progress=not quiet)
    try:
        with _log_on_stderr(quiet=quiet, verbose=verbose):
            command()
        sys.stdout.flush()
    except InputError as error:
        print(f"refusal-lens: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _log_on_stderr(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Show the package's log on stderr, a line each: warnings, or errors alone, or all of it."""
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
    """Let the terminal show our lines alone: a library's deprecations are not the user's business."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
