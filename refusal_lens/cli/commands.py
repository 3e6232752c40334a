"""The other commands: `refusal-lens report | sensitivity | select | atlas | ...`."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import refusal_lens as rl

from ..activations import disk
from ..activations.store import default_folder
from ..experiment import distributed
from ..experiment.atlas import LIKENESS
from ..experiment.wording import WORDS
from ..prompts.contrast import as_contrast
from .options import (
    MODEL,
    CacheOptions,
    ContrastOptions,
    Folder,
    ModelOptions,
    Number,
    RefusalOptions,
    Text,
)
from .show import show, table

ENDINGS = (".safetensors", ".npy", ".gguf")  # formats that `convert` writes

Hook = Annotated[
    Literal["resid_pre", "resid_post"] | None,
    tyro.conf.arg(metavar="{resid_pre,resid_post}", help_behavior_hint=""),
]


@dataclass(frozen=True)
class Report:
    """Write the report of saved results, one file that needs no network. Runs no model."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # A run's folder.
    out: Folder = None  # File to write. Default: report.html in that folder.

    def __call__(self) -> None:
        path = self.out or self.folder / "report.html"
        print(rl.write_report(rl.Results.load(self.folder), path))


@dataclass(frozen=True, kw_only=True)
class Multiverse(CacheOptions, ContrastOptions, ModelOptions):
    """Compare two contrasts under many protocols: which choice changes the cosine?

    Changes the published protocol, with its known bugs, into the default one choice at a time, then
    changes single choices of the default, and takes small subsets of the prompts. An interrupted run
    resumes.
    """

    layer: Number = None  # Layer to report, from 0. Default: 20 of 32, or the same depth.
    causal_prompts: int = 24  # Prompts of each set to intervene on; 0: fast, without verdicts.
    seed: int = 0  # Seed of subsets and resamples.

    def __call__(self) -> None:
        config = rl.Config(controls=(), max_prompts=self.max_prompts, **self.concepts())
        refusal, against = config.contrasts().values()
        out = self.start("-sensitivity")
        if not self.quiet:
            print(WORDS["sensitivity_time"], file=sys.stderr)

        def save(found: rl.Sensitivity) -> None:
            if distributed.is_main():
                found.save(out)

        found = rl.run_sensitivity(
            self.model,
            (refusal, against),
            cache=self.store,
            device=self.device,
            n_devices=self.n_devices,
            layer=self.layer,
            causal_prompts=self.causal_prompts,
            seed=self.seed,
            progress=distributed.is_main() and not self.quiet,
            on_cosines=save,
        )
        save(found)
        rows = [
            [name, *(f"{x:+z.3f}".replace("+nan", "unknown") for x in row[:3]), row["verdict"]]
            for (_, name), row in found.table().drop(columns="unbiased").iterrows()
        ]
        head = ["specification", "cosine", "lower end", "upper end", "verdict"]
        skipped = [f"Skipped: {name} ({why})" for name, why in found.skipped.items()]
        texts = filter(None, [found.sentence(), found.scatter()])
        show(*texts, table(head, rows), *skipped, f"Written to {out}")


@dataclass(frozen=True, kw_only=True)
class Select(RefusalOptions, ModelOptions):
    """Choose one refusal direction among all positions and layers, as Arditi et al. do.

    Ablates and adds each candidate. Chooses the candidate that passes the filters and whose ablation
    leaves the least refusal. An interrupted run resumes.
    """

    def __call__(self) -> None:
        contrast = as_contrast(self.own())
        out, writes = self.start("-select"), distributed.is_main()
        found = rl.select_direction(
            self.load(),
            contrast,
            folder=out if writes else None,
            progress=writes and not self.quiet,
            divide=distributed.in_shares,
        )
        if writes and found.chosen is not None:
            known: dict[str, Any] = {"source": self.model, "model": self.model}
            known |= {"position": found.chosen.position, "contrast": contrast.name}
            known |= {"normalisation": "none: mean(target) - mean(baseline)"}
            direction = rl.formats.Directions(found.direction[None], (found.layer,), **known)
            rl.formats.write_directions(direction, out / "direction.safetensors")
        if writes:
            with disk.whole_directory(out) as staging:
                for name, figure in found.figures().items():
                    (staging / f"{name}.html").write_text(rl.plotting.page(figure), "utf-8")
        show(str(found), f"Written to {out}")


@dataclass(frozen=True, kw_only=True)
class ConceptMap(CacheOptions, ModelOptions):
    """Map many concepts: which is refusal most like, and what does each direction do?

    Prints the concepts, likest to refusal first, with simultaneous intervals and a verdict each, and
    writes figures and every number. Takes minutes for a small model; an interrupted run resumes.
    A concept of your own is a table with a column of prompts with it and a column without:
    `--concepts negativity,mine.csv:with:without`. Several models in one figure: `--model A --model B`.
    """

    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # type: ignore[assignment]
    """As in `run`, with the same default. Repeat for several models."""
    concepts: tuple[str, ...] = rl.bundled_contrasts()  # Bundled names, or FILE:COLUMN:COLUMN.
    layer: Number = None  # Layer to intervene at, from 0. Default: 20 of 32, or the same depth.
    max_prompts: Number = None  # Use only so many prompts of every set. Default: all.

    def __call__(self) -> None:
        texts = ",".join(self.concepts).split(",")
        concepts = [_own_concept(text) if ":" in text else text for text in texts]
        options = {name: getattr(self, name) for name in ("layer", "max_prompts", "device")}
        options |= {"cache": self.store, "n_devices": self.n_devices}
        models, atlases = self.model or (MODEL,), []
        for model in models:
            own = re.sub(r"[^\w.-]+", "-", model) if len(models) > 1 else ""
            out = ModelOptions(model=model, out=self.out and self.out / own).start("-atlas")
            found = rl.compare_concepts(model, concepts, progress=not self.quiet, **options)
            found.save(out)
            atlases.append(found)
            show(f"{model}, layer {found.layer}", str(found), f"Written to {out}")
        if len(models) > 1 and distributed.is_main():
            with disk.whole_directory(self.out or Path("runs/atlas")) as staging:
                for what in LIKENESS:
                    figure = atlases[0].beside(*atlases[1:], likeness=what)
                    (staging / f"models-{what}.html").write_text(rl.plotting.page(figure), "utf-8")
            show(f"All models in one figure: {self.out or 'runs/atlas'}/models-cosine.html")


def _own_concept(text: str) -> "rl.Contrast":
    if text.count(":") < 2:
        raise rl.InputError(f"--concepts {text}: write FILE:COLUMN:COLUMN, with and without")
    path, target, baseline = text.rsplit(":", 2)
    return rl.contrast_from_file(path, target=target, baseline=baseline)


@dataclass(frozen=True)
class StoredWork:
    """Show what the cache of activations and results holds, or clear it."""

    action: Annotated[Literal["info", "clear"], tyro.conf.Positional] = "info"  # Show or remove.
    cache: Folder = None  # Finished work. Default: $REFUSAL_LENS_CACHE or among the user's caches.

    def __call__(self) -> None:
        cache = rl.Cache(self.cache or default_folder())
        if self.action == "clear":
            print(f"removed {cache.clear() / 1e6:.1f} MB from {cache.folder}")
            return
        print(cache.folder)
        for what, (n_files, n_tensors, n_bytes) in cache.holdings().items():
            print(f"{what}: {n_tensors} tensors in {n_files} files, {n_bytes / 1e6:.1f} MB")


@dataclass(frozen=True)
class FileOptions:
    """What a file of directions does not specify."""

    key: Text = None  # Name of one of several tensors; for the folder of a run, the contrast.
    position: Text = None  # One of several positions (default: -1), or the position of the file.
    layer: Number = None  # Layer of a single direction, in the file's own count.
    hook: Hook = None  # resid_pre: layer l is the input of block l; resid_post: its output.
    model: Text = None  # Model of the directions, if the file does not name it.

    def read(self, path: Path) -> "rl.formats.Directions":
        """Return the directions in a file or in the folder of a run."""
        number = re.fullmatch(r"-?\d+", self.position or "")
        position = int(number[0]) if number else self.position
        return rl.formats.read_directions(path, **(vars(self) | {"position": position}))


@dataclass(frozen=True)
class Compare:
    """Compare two files of directions by their cosine at every layer, with a baseline.

    Reads the folder of a run (name a contrast with --a.key, --b.key) and files of other projects:
    mean_diffs.pt and direction.pt of Arditi et al., safetensors, .npy, .json and GGUF control vectors.
    Layer l is the output of block l; the output states every conversion. A file compared with itself
    shows how its direction changes from layer to layer.
    """

    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]  # First file or run.
    second: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]  # Other file or run.
    a: FileOptions = FileOptions()
    b: FileOptions = FileOptions()

    def __call__(self) -> None:
        print(rl.formats.compare(self.a.read(self.first), self.b.read(self.second)))


@dataclass(frozen=True)
class Convert:
    """Convert a file of directions into the format that another tool loads.

    OUT ends with .safetensors or .npy, both with metadata, or with .gguf, a control vector for
    llama.cpp and repeng, without layer 0, which llama.cpp can't steer. An existing file is replaced.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """File of directions, or the folder of a run (name a contrast with --key)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]  # File to write.
    file: tyro.conf.OmitArgPrefixes[FileOptions] = FileOptions()
    model_type: Text = None  # For .gguf: model_type in the Hugging Face configuration (llama).

    def __call__(self) -> None:
        suffix = self.out.suffix.lower()
        if suffix not in ENDINGS:
            raise rl.InputError(f"{self.out}: choose {', '.join(ENDINGS)}, not this ending")
        if (suffix == ".gguf") != bool(self.model_type):
            raise rl.InputError("--model-type, such as llama, is for .gguf alone, which needs it")
        directions = self.file.read(self.source)
        if suffix == ".gguf":
            rl.formats.write_control_vector(directions, self.out, model_type=str(self.model_type))
        else:
            rl.formats.write_directions(directions, self.out)
        print(rl.formats.read_directions(self.out), f"Written to {self.out}", sep="\n")
