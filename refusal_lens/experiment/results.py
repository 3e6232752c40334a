"""The results of one run: display, files and figures."""

import html
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations import disk
from ..errors import InputError, lenient
from ..interventions import ContrastEffects, CrossEffects, Effects, Intervention, ReplyOpenings
from ..interventions.doses import DoseResponse
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..uncertainty import Cause, Caution, CosineStatistics, Unmeasured
from . import wording
from .causal import Causal
from .config import Config, some_prompts
from .serialise import pack, unpack
from .verdict import Estimate, Evidence, Reason, Thresholds, Verdict, published_rule

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ..plotting.theme import Theme

SUMMARY = "refusal_specificity_results.pt"
FORMAT = 7
DIRECTIONS = "/directions/"  # path of the directions among the packed tensors
SAVED = (  # the only dataclasses and enums in saved results
    *(Config, Contrast, Protocol, Thresholds, CosineStatistics, Unmeasured, Estimate, Evidence),
    *(Reason, Verdict, Causal, ReplyOpenings, Effects, CrossEffects, ContrastEffects),
    *(Cause, Caution, Intervention, DoseResponse),
)


@lenient
@dataclass(frozen=True, repr=False)
class Results:
    """The results of one run.

    >>> results.to_pandas().columns[0]
    'refusal_vs_negativity'
    >>> again = Results.load(results.save("runs/mine"))
    >>> known = again.model_name, again.n_layers, again.names, again.summary()
    >>> words = again.sentence(), again.verdict_lines(), again.uncertainty(), again.rule()
    >>> shown = again.figure(), again.table(), again.prompts(), again.why_unknown(layer=0)

    Attributes:
        config: the configuration of the run.
        contrasts: part -> contrast: `refusal`, `negativity`, then the controls.
        layer, layer_note: the highlighted layer, and why this layer.
        directions: part -> mean difference, float32, not normalised.
        similarities: name -> cosine; NaN where a direction is rounding noise.
        norms: part -> norm of its direction; also of the `residual stream`.
        statistics: part -> uncertainty of the cosine of refusal with the part's direction.
        metrics, estimators: similarity of refusal and negativity, by measure and by estimator.
        auroc: "refusal direction on negativity" and so on -> held-out AUROC.
        projections: direction -> prompt set -> projection of every prompt.
        plane: prompt set -> projections on unit refusal and unit negativity.
        components: prompt set -> scores on the first two principal components.
        causal: effects of the interventions; None without interventions.
        verdict: distinct, shared, partly shared or inconclusive, with reasons.
        provenance: model, hashes of the prompts, seed, versions.
    """

    config: Config
    contrasts: dict[str, Contrast]
    layer: int
    layer_note: str
    directions: dict[str, Float[Tensor, "layer d_model"]]
    similarities: dict[str, Float[Tensor, " layer"]]
    norms: dict[str, Float[Tensor, " layer"]]
    statistics: dict[str, CosineStatistics]
    metrics: dict[str, Float[Tensor, " layer"]]
    estimators: dict[str, Float[Tensor, " layer"]]
    auroc: dict[str, Float[Tensor, " layer"]]
    projections: dict[str, dict[str, Float[Tensor, "_ layer"]]]
    plane: dict[str, Float[Tensor, "_ layer 2"]]
    components: dict[str, Float[Tensor, "_ layer 2"]]
    causal: Causal | None
    verdict: Verdict
    provenance: dict[str, Any]

    @property
    def n_layers(self) -> int:
        """Number of layers of the model."""
        return len(self.similarities["refusal_vs_negativity"])

    @property
    def model_name(self) -> str:
        """The model's name in the configuration; for a loaded model, its own name."""
        return str(self.provenance["model"]["model"])

    @property
    def names(self) -> wording.Names:
        """Names of the refusal and negativity contrasts and of their prompt sets."""
        return wording.Names.of(self.contrasts["refusal"], self.contrasts["negativity"])

    def table(self) -> list[tuple[str, float, str]]:
        """Return the published table at the highlighted layer: measure, cosine, published rule."""
        names, controls = self.names, [*self.contrasts][2:]
        measures = [words.format(**names._asdict()) for words in wording.WORDS["table"]]
        measures += [f"{names.refusal} vs {part} direction (control)" for part in controls]
        cosines = [float(values[self.layer]) for values in self.similarities.values()]
        return [(m, c, published_rule(c)) for m, c in zip(measures, cosines, strict=True)]

    def sentence(self) -> str:
        """Return the verdict in one or two plain sentences."""
        return wording.plain_sentence(self.verdict, self.names)

    def verdict_lines(self) -> list[str]:
        """Return the verdict's reasons, then its geometry, in words."""
        missing = self.provenance.get("interventions")
        lines = wording.verdict_lines(self.verdict, self.names)
        return [f"Interventions: {missing}.", *lines] if missing else lines

    def rule(self) -> str:
        """Return the verdict's rule in words, with its thresholds."""
        return wording.rule(self.verdict.thresholds, self.names)

    def prompts(self) -> dict[str, tuple[str, ...]]:
        """Return the prompts of refusal and negativity, by the name of the set."""
        refusal, negativity = self.contrasts["refusal"], self.contrasts["negativity"]
        sides = (refusal.target, refusal.baseline, negativity.target, negativity.baseline)
        return dict(zip(self.names[2:], sides, strict=True))

    def to_pandas(self, rows: Literal["layers", "prompts"] = "layers") -> "pd.DataFrame":
        """Return layers by measures, or prompts by projections and refusal score, as a table.

        The table's own `to_csv` and `to_parquet` write it. Projections are those at the highlighted
        layer. The refusal score of the unmodified model is NaN for prompts that were not scored.
        """
        import pandas as pd

        if rows == "layers":
            norms = {f"norm of {name}": values for name, values in self.norms.items()}
            curves = self.similarities | norms | self.metrics | self.estimators | self.auroc
            index = pd.RangeIndex(self.n_layers, name="layer")
            return pd.DataFrame({k: v.tolist() for k, v in curves.items()}, index=index)
        if rows != "prompts":
            raise InputError(f"there are no rows {rows!r}: choose 'layers' or 'prompts'")
        scores: dict[str, float] = {}
        if self.causal:
            requests, found = self.contrasts["refusal"], self.causal.ablation.negativity
            some = some_prompts(self.contrasts["negativity"], self.causal.n_prompts)
            sides = [requests.target, requests.baseline, some.target, some.baseline]
            known = [*self.causal.requests, found.target_log_odds[0], found.baseline_log_odds[0]]
            for side, odds in zip(sides, known, strict=True):
                scores |= zip(side, odds.tolist(), strict=True)
        tables = []
        for name, prompts in self.prompts().items():
            table = pd.DataFrame({"set": name, "prompt": prompts})
            for of, sets in self.projections.items():
                table[f"projection on {of}"] = sets[name][:, self.layer].tolist()
            tables.append(table.assign(**{"refusal score": table["prompt"].map(scores)}))
        return pd.concat(tables, ignore_index=True)

    def why_unknown(self, layer: int, part: str = "negativity") -> str:
        """Return why the cosine of refusal with a part is NaN at a layer; empty if it is known."""
        if part not in self.statistics or not 0 <= layer < self.n_layers:
            known = f"{', '.join(self.statistics)} at layers 0 to {self.n_layers - 1}"
            raise InputError(f"no cosine with {part!r} at layer {layer}: choose {known}")
        reason = self.statistics[part].reasons[layer]
        directions = {"a": self.contrasts["refusal"].name, "b": self.contrasts[part].name}
        return "" if reason is None else wording.unmeasured(reason, directions)

    def uncertainty(self) -> list[str]:
        """Return the uncertainty of the cosine at the highlighted layer, in lines of text."""
        if why := self.why_unknown(self.layer):
            return [f"true cosine: not measurable at layer {self.layer}, {why}"]
        return wording.uncertainty(self.statistics["negativity"], self.layer)

    def figure(self, *, theme: "Theme" = "light") -> "go.Figure":
        """Return the cosine across depth with intervals, null and ceiling, in a light or dark theme."""
        from .. import plotting

        refusal, *others = (contrast.name for contrast in self.contrasts.values())
        curves = [self.similarities[f"refusal_vs_{part}"] for part in [*self.contrasts][1:]]
        sure = self.statistics["negativity"]
        return plotting.cosine_by_layer(
            {f"{refusal} vs {name}": curve for name, curve in zip(others, curves, strict=True)},
            highlight=self.layer,
            interval=(sure.lower, sure.upper),
            band=(sure.band_lower, sure.band_upper),
            null=(sure.null_lower, sure.null_upper),
            ceiling=sure.ceiling,
            unbiased=sure.unbiased,
            strongest=self.causal.strongest if self.causal and self.causal.strongest >= 0 else None,
            confidence=sure.confidence,
            title=f"Refusal vs {others[0]}: {self.model_name}",
            theme=theme,
        )

    def save(self, folder: str | Path) -> Path:
        """Write the results to a folder and return the folder; raise InputError if this fails.

        Writes the published experiment's `refusal_specificity_results.pt`, `results.json`,
        `directions.safetensors`, `measurements.safetensors` and `cosine_by_layer.html`.
        """
        from .. import plotting

        tree, tensors = pack(self)
        *reasons, geometry = self.verdict_lines()
        curves = ("norms", "metrics", "estimators", "auroc")
        document = {
            "format": FORMAT,
            "model": self.model_name,
            "layer": self.layer,
            "layer_note": self.layer_note,
            "at_highlighted_layer": [
                dict(zip(("measure", "cosine", "published_rule"), row, strict=True))
                for row in self.table()
            ],
            "uncertainty_at_highlighted_layer": {
                part: wording.at_layer(s, self.layer) for part, s in self.statistics.items()
            },
            "verdict": {"answer": self.verdict.answer, "reasons": reasons, "geometry": geometry}
            | {"sentence": self.sentence(), "evidence": self.verdict.evidence, "rule": self.rule()},
            "by_layer": self.similarities | {name: getattr(self, name) for name in curves},
            "provenance": self.provenance,
        }
        measurements = {k: v for k, v in tensors.items() if not k.startswith(DIRECTIONS)}
        metadata = {
            "layer": "row l is blocks.{l}.hook_resid_post",
            "model": self.model_name,
            "position": str(self.config.protocol.positions[0]),
            "normalisation": "none: mean(target) - mean(baseline)",
        }
        with disk.whole_directory(folder) as staging:
            torch.save(self.summary(), staging / SUMMARY)
            disk.write_tensors(staging / "directions.safetensors", self.directions, metadata)
            disk.write_tensors(staging / "measurements.safetensors", measurements)
            disk.write_json(staging / "results.json", disk.plain(document) | {"saved": tree})
            (staging / "cosine_by_layer.html").write_text(plotting.page(self.figure()), "utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Load saved results; raise InputError if a file is missing, damaged or of another format.
        >>> results = load_results(results.save("runs/mine"))
        """
        folder = Path(folder)
        document = _read_document(folder / "results.json")
        tensors = disk.read_tensors(folder / "measurements.safetensors")
        directions = disk.read_tensors(folder / "directions.safetensors")
        tensors |= {DIRECTIONS + part: tensor for part, tensor in directions.items()}
        if isinstance(results := unpack(document.get("saved"), tensors, (cls, *SAVED)), cls):
            return results
        raise InputError(f"{folder} holds no results: save them anew")

    def summary(self) -> dict[str, Any]:
        """Return the published experiment's summary: tensors by layer, scalars at the layer."""
        return {
            "model": self.model_name,
            "layer": self.layer,
            "refusal_direction": self.directions["refusal"],
            "negativity_direction": self.directions["negativity"],
            "cosine_similarity": self.similarities["refusal_vs_negativity"],
            **{k: float(v[self.layer]) for k, v in [*self.similarities.items()][:4]},
        }

    def __str__(self) -> str:
        table = self.table()
        width = max(len(measure) for measure, _, _ in table)
        lines = [
            f"{self.model_name}, {self.layer_note}\n",
            wording.verdict_text(self.verdict, self.names),
            f"\n{'measure':<{width}}   cosine  the published rule would say",
            *(f"{measure:<{width}}  {value:+.4f}  {rule}" for measure, value, rule in table),
            "\n" + "\n".join(self.uncertainty()),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        cosine = float(self.similarities["refusal_vs_negativity"][self.layer])
        found = f"layer {self.layer}: cosine {cosine:+.4f}, {self.verdict.answer}"
        return f"Results({self.model_name}, {found})"

    def _repr_html_(self) -> str:
        import pandas as pd

        columns = ["measure", "cosine", "the published rule would say"]
        table = pd.DataFrame(self.table(), columns=columns)
        words = (f"{self.model_name}, {self.layer_note}", self.sentence(), *self.verdict_lines())
        note, sentence, *reasons = map(html.escape, words)
        return (
            f"<p><b>{note}</b></p><p>verdict: <b>{self.verdict.answer}</b>. {sentence}</p>"
            f"<ul><li>{'</li><li>'.join(reasons)}</li></ul>"
            + table.to_html(index=False, float_format="{:+.4f}".format)
        )

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        from ..plotting.theme import DARK_JUPYTER

        display(HTML(DARK_JUPYTER + self._repr_html_()))
        display(self.figure())


load_results = Results.load


def config_of(path: str | Path) -> Config:
    """Return the configuration that repeats a run, with its prompts and model revision.

    `path` is the run's `results.json` or its folder. Raises InputError as `Results.load`.
    >>> config = config_of(results.save("runs/mine"))
    """
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    document = _read_document(path)
    try:
        saved = document["saved"]["fields"]
        config, contrasts = (unpack(saved[name], {}, SAVED) for name in ("config", "contrasts"))
        refusal, negativity, *controls = contrasts.values()
        concepts = {"refusal": refusal, "negativity": negativity, "controls": tuple(controls)}
        revision = config.revision or document["provenance"]["model"].get("revision")
        return replace(config, **concepts, revision=revision)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError(f"{path} lacks the configuration of its run: save it anew") from None


def _read_document(path: Path) -> dict[str, Any]:
    document = disk.read_json(path)
    if isinstance(document, dict) and document.get("format") == FORMAT:
        return document
    raise InputError(f"{path} is not of format {FORMAT}: name a run that this version saved")
