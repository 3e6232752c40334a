"""A map of concepts: which of them is refusal most like, and what does each direction do?"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations import disk
from ..activations.extract import ContrastActivations, by_contrast
from ..activations.store import Cache
from ..attribution import Table
from ..directions import similarity
from ..directions.estimators import mean_difference
from ..errors import InputError
from ..models.load import model_provenance
from ..prompts.contrast import BUNDLED, Contrast, as_contrast
from . import measures
from .cached_model import CachedModel
from .causal import FEWEST_PROMPTS
from .concepts import Concepts, Pairs, Runs
from .config import Config
from .distributed import is_main
from .run import highlighted_layer, provenance
from .serialise import pack, unpack
from .verdict import Estimate, Evidence, Reason, Thresholds, Verdict, judge

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ..models import HookedModel

Likeness = Literal["cosine", "cross_ablation", "cross_addition"]  # of `Evidence`
LIKENESS: tuple[Likeness, ...] = get_args(Likeness)
ENDS = ("", " lower", " upper")


@dataclass(frozen=True, repr=False, eq=False)
class Atlas(Table):
    """Concepts compared with refusal, the first, and with one another; an axis of 3 is an interval.

    Attributes:
        model, layer: the model, and the layer of interventions and verdicts.
        directions: mean differences by concept, not normalised.
        cosine, auroc: of the true directions, NaN where not measurable; of each concept's direction
            (second axis) on each concept's prompts.
        likeness: `LIKENESS` of all concepts but refusal; the intervals hold for all at once. Effects
            are NaN in a model that refuses too little to explain.
        verdicts: the answers of `run_experiment` for refusal and each other concept.
        separable: AUROC of the concepts (second axis) at later layers by a discriminant fitted under
            the ablation of nothing (row 0) or of a concept.
        kept: share of a concept's (second axis) separation along its direction, in cosines over later
            layers, that a concept's ablation leaves. Both are 1 for two directions that are
            representationally independent (Wollschläger et al. 2025, arXiv:2502.17420).
        provenance: model, hashes of the prompts, seed, versions.
    >>> again = Atlas.load(atlas.save("runs/atlas"))
    >>> shown = again.to_pandas(), again.figures()
    """

    model: str
    layer: int
    directions: dict[str, Float[Tensor, "layer d_model"]]
    cosine: Pairs
    auroc: Pairs
    likeness: Float[Tensor, "3 others 3"]
    verdicts: dict[str, Verdict]
    separable: Float[Tensor, "3 intervention concept later_layer"] | None
    kept: Float[Tensor, "3 concept concept"] | None
    provenance: dict[str, Any]

    def to_pandas(self) -> "pd.DataFrame":
        """Return the concepts, likest to refusal first: by what ablating does, or else by cosine.

        A rank is the range that the simultaneous intervals leave open.
        """
        import pandas as pd

        rows, names = [], [*self.verdicts]
        value, lower, upper = self.likeness[:, :, int(self.likeness[0, :, 1].isfinite().any())]
        for i in value.nan_to_num(-torch.inf).argsort(descending=True).tolist():
            best, beaten = 1 + int((lower > upper[i]).sum()), int((upper < lower[i]).sum())
            row: dict[str, Any] = {"concept": names[i], "rank": f"{best} to {len(names) - beaten}"}
            for what, ends in zip(LIKENESS, self.likeness[:, i].T.tolist(), strict=True):
                row |= {what + end: value for end, value in zip(ENDS, ends, strict=True)}
            rows.append(row | {"verdict": self.verdicts[names[i]].answer})
        return pd.DataFrame(rows)

    def figures(self, **theme: Any) -> "dict[str, go.Figure]":
        """Return the concepts' cosines and places, what directions tell, and what ablations leave."""
        from .. import plotting

        names, options = [*self.directions], {"highlight": self.layer} | theme
        # The principal components of unit vectors are the classical scaling of their cosines.
        units = {k: similarity.unit(v).nan_to_num()[None] for k, v in self.directions.items()}
        places = torch.cat([*measures.in_components(units).values()])
        area: Any = {"quantity": "AUROC", "limits": (0.0, 1.0)} | options
        found = {
            "cosines": plotting.concept_map(self.cosine, names, places=places, **options),
            "detection": plotting.concept_map(self.auroc, names, **area),
        }
        if self.kept is not None:
            left: Any = {"outcomes": names, "quantity": "percent of separation left", **theme}
            left |= {"interventions": [f"ablate {name}" for name in names]}
            left |= {"title": "Representational independence"}
            found["independence"] = plotting.cross_effects(100 * self.kept[0], **left)
        return found

    def beside(self, *others: "Atlas", likeness: Likeness = "cosine", **theme: Any) -> "go.Figure":
        """Return each concept's likeness to refusal in several models, with simultaneous intervals.
        >>> shown = atlas.beside(atlas, likeness="cross_ablation")
        """
        from .. import plotting

        values, at = {}, LIKENESS.index(likeness)
        for each in (self, *others):
            rows = zip(each.verdicts, each.likeness[:, :, at].T.tolist(), strict=True)
            values[f"{each.model}, layer {each.layer}"] = dict(rows)
        quantity = f"{likeness}, 1 is that of refusal itself".replace("_", "-")
        return plotting.intervals_by_name(values, quantity=quantity, **theme)

    def save(self, folder: str | Path) -> Path:
        """Write `atlas.json`, `atlas.safetensors` and figures as pages; InputError on failure."""
        from .. import plotting

        tree, tensors = pack(self)
        document = {"ranking": disk.plain(self.to_pandas().to_dict("records")), "saved": tree}
        with disk.whole_directory(folder) as staging:
            disk.write_tensors(staging / "atlas.safetensors", tensors)
            disk.write_json(staging / "atlas.json", document)
            for name, figure in self.figures().items():
                (staging / f"{name}.html").write_text(plotting.page(figure), "utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Atlas":
        """Load a saved map; InputError if a file is missing, damaged or of another version."""
        document = disk.read_json(Path(folder) / "atlas.json")
        tensors = disk.read_tensors(Path(folder) / "atlas.safetensors")
        saved = document.get("saved") if isinstance(document, dict) else document
        found = unpack(saved, tensors, (cls, Verdict, Evidence, Estimate, Reason, Thresholds))
        if isinstance(found, cls):
            return found
        raise InputError(f"{folder} holds no map of concepts: save it anew")

    def _rows(self) -> list[list[str]]:
        rows = [["concept", "rank", "cosine", "ablating it", "adding it", "verdict"]]
        for row in self.to_pandas().to_dict("records"):
            three = [Estimate(*(row[what + end] for end in ENDS)) for what in LIKENESS]
            rows.append([row["concept"], row["rank"], *map(str, three), row["verdict"]])
        return rows


def compare_concepts(
    model: "str | Path | HookedModel",
    concepts: Sequence[str | Contrast] = BUNDLED,
    *,
    progress: bool = True,
    cache: Cache | str | Path | None = None,
    **options: Any,
) -> Atlas:
    """Compare many concepts with refusal and with one another: directions, and what they do.

    >>> quick = {"max_prompts": 8, "interventions": False}
    >>> [*compare_concepts("organism:specific", ["joy"], **quick).directions]
    ['refusal', 'joy']

    Up to 32 prompts a side are run again with every concept's direction of one layer ablated.

    Args:
        model: its name, or a loaded model, of which nothing is cached.
        concepts: bundled names, or contrasts of different names; refusal is always there.
        progress: show one progress bar, which names the step.
        cache: folder of finished concepts, from which an interrupted run resumes.
        options: fields of `Config`, such as `layer`, `refusal` or `max_prompts`.

    Raises:
        InputError: if there is nothing to compare, or if two concepts share a name or a prompt.
    """
    from tqdm.auto import tqdm

    named = isinstance(model, (str, Path))
    config, contrasts = _chosen(concepts, ({"model": model} if named else {}) | options)
    source = CachedModel(config, cache, model=None if named else model)  # type: ignore[arg-type]
    origin, n_layers = source.remember(
        "model", {}, lambda: (model_provenance(source.model), source.model.cfg.n_layers)
    )
    read = partial(source.prompt_activations, progress=False)
    sides: dict[str, ContrastActivations] = {}
    runs: dict[str, Runs] = {}
    with tqdm(total=3 * len(contrasts), unit="step", disable=not (progress and is_main())) as bar:

        def each(step: str) -> Iterator[str]:
            for name in contrasts:
                bar.set_description(f"{step} {name}")
                yield name
                bar.update()

        for name in each("reading"):
            sides |= by_contrast(read, {name: contrasts[name]})
        work = Concepts(source, contrasts, sides, highlighted_layer(config.layer, n_layers)[0])
        cosine = work.cosines(each("cosines of"))
        fewest = min(len(side) for c in contrasts.values() for side in (c.target, c.baseline))
        if config.interventions and fewest >= FEWEST_PROMPTS:
            work.begin()
            runs = {k: work.run(k) for k in each("interventions on")}
    return _atlas(work, runs, cosine, provenance(origin, contrasts, config))


def _atlas(work: Concepts, runs: dict[str, Runs], cosine: Pairs, origin: dict[str, Any]) -> Atlas:
    config, sides, (_, *others) = work.source.config, work.activations, work.contrasts
    together = 1 - (1 - config.confidence) / len(others)
    shown = [asdict(work.evidence(name, runs, together)) for name in others]
    likeness = torch.tensor([[[*each[what].values()] for what in LIKENESS] for each in shown])
    evidence = {name: work.evidence(name, runs, config.confidence) for name in others}
    if not evidence[others[0]].refused_gap.lower > config.thresholds.min_refused_gap:
        likeness[:, 1:] = torch.nan
    names = {name: (f"{name} target", f"{name} baseline") for name in sides}
    areas = [*measures.aurocs(measures.projections(sides, names), names).values()]
    after = [[run[what] for run in runs.values()] for what in ("separable", "kept")]
    return Atlas(
        model=str(origin["model"]["model"]),
        layer=work.layer,
        directions={name: mean_difference(*each) for name, each in sides.items()},
        cosine=cosine,
        auroc=torch.stack(areas, 1).unflatten(1, (len(names), -1)),
        likeness=likeness.movedim(-1, 0),
        verdicts={name: judge(each, config.thresholds) for name, each in evidence.items()},
        separable=torch.stack(after[0], 2) if runs else None,
        kept=torch.stack(after[1], 2) if runs else None,
        provenance=origin,
    )


def _chosen(
    concepts: Sequence[str | Contrast], options: dict[str, Any]
) -> tuple[Config, dict[str, Contrast]]:
    """The configuration, and the contrasts by name, refusal first."""
    config = Config.of(options)
    refusal = as_contrast(config.refusal)
    others = [each for each in map(as_contrast, concepts) if each.name != refusal.name]
    if not others:
        raise InputError(f"there is nothing to compare {refusal.name!r} with: name another concept")
    if len(names := {each.name for each in others}) < len(others):
        raise InputError(f"two concepts share a name, of {sorted(names)}: rename one")
    others.sort(key=lambda each: each.name != "negativity")  # a control can't have that name
    config = replace(config, refusal=refusal, negativity=others[0], controls=tuple(others[1:]))
    return config, {each.name: each for each in config.contrasts().values()}
