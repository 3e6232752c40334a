"""The commands beside the experiment: `refusal-lens report | sensitivity | select | cache`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Number = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]

MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"


def out_folder(model: str, suffix: str = "") -> Path:
    """Where a run's files go unless told otherwise."""
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", model).strip("-.") + suffix)


@dataclass(frozen=True)
class Report:
    """Write the page about saved results: one file that needs no network, to read or to send.

    Made from a run's folder alone; no model is needed.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder that `refusal-lens run` wrote."""
    out: Folder = None
    """The file to write. Default: report.html in that folder."""

    def __call__(self) -> None:
        """Write it."""
        from ..experiment.results import Results
        from ..report import write_report

        print(write_report(Results.load(self.folder), self.out or self.folder / "report.html"))


@dataclass(frozen=True)
class Sensitivity:
    """Read the same prompts in every way that people do, and see which choice moves the cosine.

    From the published experiment's protocol, faults included, to ours one choice at a time; one
    choice changed at a time around ours; and over small subsets of the prompts.
    """

    model: str = MODEL
    """A hub name, a local directory, or organism:specific, organism:entangled, organism:oblivious."""
    layer: Number = None
    """Layer to tell of (0 is the first block's output). Default: 20 of 32, else as deep."""
    out: Folder = None
    """Folder for the table and the figure. Default: runs/, the model's name and -sensitivity."""
    refusal: str = "refusal"
    """Bundled contrast whose direction is in question."""
    against: str = "negativity"
    """Bundled contrast that it is compared with."""
    causal_prompts: int = 24
    """Prompts of each set that interventions are read on; 0: no verdicts, much faster."""
    device: Text = None
    """cuda, cpu, ... Default: the GPU where there is one."""
    seed: int = 0
    """Seed of subsets and resamples."""
    quiet: bool = False
    """Print nothing but the results."""

    def __call__(self) -> None:
        """Run it."""
        from ..activations import disk as artifacts
        from ..models.load import load_model
        from ..multiverse.run import run_sensitivity
        from ..prompts.contrast import load_contrast

        out = self.out or out_folder(self.model, "-sensitivity")
        contrasts = load_contrast(self.refusal), load_contrast(self.against)
        artifacts.check_writable(out)
        model = load_model(self.model, device=self.device)
        found = run_sensitivity(
            model,
            contrasts,
            layer=self.layer,
            causal_prompts=self.causal_prompts,
            seed=self.seed,
            progress=not self.quiet,
        )
        found.save(out)
        print(found)
        print(f"\nWritten to {out}")


@dataclass(frozen=True)
class Select:
    """Choose one refusal direction of all positions and layers, as Arditi et al. do.

    Each candidate is ablated and added; of those that pass the filters the one whose ablation
    leaves the least refusal is taken. A run that was stopped goes on where it was.
    """

    model: str = MODEL
    """A hub name, a local directory, or organism:specific, organism:entangled, organism:oblivious."""
    out: Folder = None
    """Folder for scores, figures and the direction. Default: runs/, the model's name and -select."""
    contrast: str = "refusal"
    """Bundled contrast: its target and baseline are the harmful and harmless prompts."""
    device: Text = None
    """cuda, cpu, ... Default: the GPU where there is one."""
    quiet: bool = False
    """Print nothing but the results."""

    def __call__(self) -> None:
        """Run it."""
        from ..activations import disk as artifacts
        from ..interventions.selection import select_direction
        from ..models.load import load_model
        from ..prompts.contrast import load_contrast

        out = self.out or out_folder(self.model, "-select")
        contrast = load_contrast(self.contrast)
        artifacts.check_writable(out)
        model = load_model(self.model, device=self.device)
        found = select_direction(model, contrast, folder=out, progress=not self.quiet)
        with artifacts.whole_directory(out) as staging:
            if found.chosen is not None:
                artifacts.write_tensors(
                    staging / "direction.safetensors",
                    {"direction": found.direction},
                    {
                        "model": self.model,
                        "layers": f"[{found.layer}]",
                        "layer": "row l is blocks.{l}.hook_resid_post",
                        "position": str(found.chosen.position),
                        "contrast": self.contrast,
                        "normalisation": "none: mean(target) - mean(baseline)",
                    },
                )
            for name, figure in found.figures().items():
                page = figure.to_html(include_plotlyjs=True, full_html=True)
                (staging / f"{name}.html").write_text(page, "utf-8")
        print(found)
        print(f"\nWritten to {out}")


@dataclass(frozen=True)
class CacheCommand:
    """Tell what the cache of activations and results holds, or clear it."""

    action: Annotated[Literal["info", "clear"], tyro.conf.Positional] = "info"
    """What to do."""
    cache: Folder = None
    """The folder. Default: $REFUSAL_LENS_CACHE, or one in the system's folder of caches."""

    def __call__(self) -> None:
        """Do it."""
        from ..activations.store import Cache, default_folder

        cache = Cache(self.cache or default_folder())
        if self.action == "clear":
            print(f"removed {cache.clear() / 1e6:.1f} MB from {cache.folder}")
            return
        print(cache.folder)
        for holding in cache.holdings():
            print(
                f"{holding.what}: {holding.n_prompts} prompts, {holding.n_files} files, "
                f"{holding.n_bytes / 1e6:.1f} MB"
            )
