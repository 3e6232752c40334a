"""What a run found: shown in Jupyter and on the console, saved whole, loaded back the same."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from ..activations import disk as artifacts
from ..errors import InputError
from ..interventions import ContrastEffects, CrossEffects, Effects, RefusalTokens
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..uncertainty import CosineStatistics
from .config import Config
from .evidence import Causal
from .verdict import Estimate, Evidence, Thresholds, Verdict, published_rule

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ..plotting.look import Theme

SUMMARY = "refusal_specificity_results.pt"
FORMAT = 2
SAVED = (
    *(Config, Contrast, Protocol, Thresholds, CosineStatistics, Estimate, Evidence, Verdict),
    *(Causal, RefusalTokens, Effects, CrossEffects, ContrastEffects),
)
"""The kinds of which saved results are made, and no others."""


@dataclass(frozen=True, repr=False)
class Results:
    """Everything one run found.

    Attributes:
        config: what was asked for.
        contrasts: the prompts by the part they play: `refusal`, `negativity`, then the controls.
        layer: the highlighted layer.
        layer_note: why that one.
        directions: part -> mean difference, `[layer d_model]`, float32, not normalised.
        similarities: name -> cosine by layer, `[layer]`; NaN where a direction is rounding noise.
        norms: part -> norm of its direction, `[layer]`, and that of the `residual stream`.
        statistics: part -> how sure the cosine of refusal with that part's direction is.
        metrics: similarity -> refusal against negativity by it, `[layer]`.
        estimators: estimator -> cosine of the two directions as it finds them, `[layer]`.
        auroc: "refusal direction on negativity" and so on -> held-out AUROC, `[layer]`.
        projections: direction -> prompt set -> projection of every prompt, `[prompt layer]`.
        plane: prompt set -> projections on unit refusal and unit negativity, `[prompt layer 2]`.
        components: prompt set -> first two principal components, `[prompt layer 2]`.
        causal: what intervening did; None where nothing was intervened with.
        verdict: distinct, shared, partly shared or inconclusive, with reasons.
        provenance: model, prompts' hashes, seed, versions.
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
        """The model's name as it was asked for or, for a model handed in, as it calls itself."""
        return str(self.provenance["model"]["model"])

    def table(self) -> list[tuple[str, float, str]]:
        """The published experiment's table at the highlighted layer: measure, value, reading.

        The reading is what the published rule would say of the number; it takes neither noise nor
        cause into account.
        """
        rows = []
        for name, values in self.similarities.items():
            value = float(values[self.layer])
            rows.append((self.describe(name), value, published_rule(value)))
        return rows

    def describe(self, similarity: str) -> str:
        """A similarity's name in words, with the names of the sets that were really compared."""
        refusal, negativity = (self.contrasts[part] for part in ("refusal", "negativity"))
        words = {
            "refusal_vs_negativity": f"{refusal.name} vs {negativity.name} direction",
            "mean_harmful_vs_mean_negative": (
                f"mean {refusal.target_name} vs mean {negativity.target_name} activation"
            ),
            "refusal_vs_mean_negative": (
                f"{refusal.name} direction vs mean {negativity.target_name} activation"
            ),
            "mean_negative_vs_mean_neutral": (
                f"mean {negativity.target_name} vs mean {negativity.baseline_name} activation"
            ),
        }
        control = similarity.removeprefix("refusal_vs_")
        return words.get(similarity, f"{refusal.name} vs {control} direction (control)")

    def profile_layers(self) -> list[int]:
        """The few layers that the short depth profile shows, the highlighted one among them."""
        step = max(1, round(self.n_layers / 8))
        return sorted({*range(0, self.n_layers, step), self.n_layers - 1, self.layer})

    def prompts(self) -> dict[str, tuple[str, ...]]:
        """The prompts of the refusal and the negativity contrast, by the name of their set."""
        return {
            name: side
            for part, names in set_names(self.contrasts).items()
            for name, side in zip(
                names, (self.contrasts[part].target, self.contrasts[part].baseline), strict=True
            )
        }

    def figure(self, *, theme: "Theme" = "light") -> "go.Figure":
        """The cosine across depth with all that it takes to judge it, the layer highlighted."""
        from .. import plotting

        curves = {
            self.describe(name).replace(" direction", "").removesuffix(" (control)"): values
            for name, values in self.similarities.items()
            if name.startswith("refusal_vs_") and name != "refusal_vs_mean_negative"
        }
        sure = self.statistics["negativity"]
        known = self.causal is not None and self.causal.strongest >= 0
        return plotting.cosine_by_layer(
            curves,
            highlight=self.layer,
            interval=(sure.lower, sure.upper),
            band=(sure.band_lower, sure.band_upper),
            null=(sure.null_lower, sure.null_upper),
            ceiling=sure.ceiling,
            unbiased=sure.unbiased,
            strongest=self.causal.strongest if self.causal is not None and known else None,
            confidence=sure.confidence,
            title=f"Refusal vs {self.contrasts['negativity'].name}: {self.model_name}",
            theme=theme,
        )

    def save(self, folder: str | Path) -> Path:
        """Write the results to a folder, whole files or none, and return it.

        `refusal_specificity_results.pt` (the published experiment's summary),
        `directions.safetensors`, `measurements.safetensors`, `results.json` and
        `cosine_by_layer.html`. Files of these names are replaced, others stay.

        Raises:
            InputError: if the folder can't be written.
        """
        tree, tensors = artifacts.pack(self)
        prefix = "/directions/"
        measurements = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        metadata = {
            "layer": "row l is blocks.{l}.hook_resid_post",
            "model": self.model_name,
            "position": str(self.config.protocol.positions[0]),
            "normalisation": "none: mean(target) - mean(baseline)",
        }
        page = self.figure().to_html(include_plotlyjs=True, full_html=True)
        with artifacts.whole_directory(folder) as staging:
            artifacts.write_summary(staging / SUMMARY, self.summary())
            artifacts.write_tensors(
                staging / "directions.safetensors", self.directions, metadata=metadata
            )
            artifacts.write_tensors(staging / "measurements.safetensors", measurements)
            artifacts.write_json(staging / "results.json", self._document(tree))
            (staging / "cosine_by_layer.html").write_text(page, "utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Read back what `save` wrote.

        Raises:
            InputError: if a file is missing, damaged or of another format.
        """
        folder = Path(folder)
        document = artifacts.read_json(folder / "results.json")
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise InputError(
                f"{folder / 'results.json'} is not of format {FORMAT}: it was not written by "
                "Results.save of this version"
            )
        tensors = artifacts.read_tensors(folder / "measurements.safetensors")
        directions = artifacts.read_tensors(folder / "directions.safetensors")
        tensors |= {f"/directions/{part}": tensor for part, tensor in directions.items()}
        results = artifacts.unpack(document.get("saved"), tensors, (cls, *SAVED))
        if not isinstance(results, cls):
            raise InputError(f"{folder / 'results.json'} holds no results: save them anew")
        return results

    def summary(self) -> dict[str, Any]:
        """The published experiment's summary: tensors by layer, scalars at the highlighted one."""
        scalars = {
            name: float(self.similarities[name][self.layer]) for name in list(self.similarities)[:4]
        }
        return {
            "model": self.model_name,
            "layer": self.layer,
            "refusal_direction": self.directions["refusal"],
            "negativity_direction": self.directions["negativity"],
            "cosine_similarity": self.similarities["refusal_vs_negativity"],
            **scalars,
        }

    def _document(self, tree: Any) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model_name,
            "layer": self.layer,
            "layer_note": self.layer_note,
            "at_highlighted_layer": [
                {"measure": measure, "cosine": artifacts.plain(value), "published_rule": reading}
                for measure, value, reading in self.table()
            ],
            "uncertainty_at_highlighted_layer": {
                part: artifacts.plain(at_layer(found, self.layer))
                for part, found in self.statistics.items()
            },
            "verdict": artifacts.plain(
                {
                    "answer": self.verdict.answer,
                    "reasons": self.verdict.reasons,
                    "geometry": self.verdict.geometry,
                    "evidence": self.verdict.evidence,
                    "rule": self.verdict.rule,
                }
            ),
            "by_layer": artifacts.plain(
                {
                    **self.similarities,
                    "norms": self.norms,
                    "metrics": self.metrics,
                    "estimators": self.estimators,
                    "auroc": self.auroc,
                }
            ),
            "provenance": artifacts.plain(self.provenance),
            "saved": tree,
        }

    def __str__(self) -> str:
        width = max(len(measure) for measure, _, _ in self.table())
        lines = [
            f"{self.model_name}, {self.layer_note}",
            "",
            str(self.verdict),
            "",
            f"{'measure':<{width}}   cosine  the published rule would say",
        ]
        lines += [
            f"{measure:<{width}}  {value:+.4f}  {reading}"
            for measure, value, reading in self.table()
        ]
        lines += ["", *self.uncertainty()]
        layers = self.profile_layers()
        cosine = self.similarities["refusal_vs_negativity"]
        unbiased = self.statistics["negativity"].unbiased
        lines += [
            "",
            f"{self.describe('refusal_vs_negativity')}, across depth",
            "layer     " + " ".join(f"{layer:>6}" for layer in layers),
            "cosine    " + " ".join(_signed(cosine[layer]) for layer in layers),
            "unbiased  " + " ".join(_signed(unbiased[layer]) for layer in layers),
        ]
        return "\n".join(lines)

    def why_unknown(self, layer: int, part: str = "negativity") -> str:
        """Why the cosine of refusal with a part can't be estimated at a layer; empty if it can."""
        reason = self.statistics[part].reasons[layer]
        names = {"a": self.contrasts["refusal"].name, "b": self.contrasts[part].name}
        for letter, name in names.items():
            reason = re.sub(
                rf"\b((?:direction|contrast|and|of) ){letter}\b", rf"\g<1>{name}", reason
            )
        return reason

    def uncertainty(self) -> list[str]:
        """How sure the cosine at the highlighted layer is, in a few lines of text."""
        sure = self.statistics["negativity"]
        here = at_layer(sure, self.layer)
        level = f"{100 * sure.confidence:g} %"
        if sure.reasons[self.layer]:
            return [
                f"true cosine: not measurable at layer {self.layer}, {sure.reasons[self.layer]}"
            ]
        return [
            f"true cosine {here['unbiased']:+.2f} (noise taken off), {level} interval "
            f"{here['lower']:+.2f} to {here['upper']:+.2f}, for all layers at once "
            f"{here['band_lower']:+.2f} to {here['band_upper']:+.2f}",
            f"reliability of the directions {here['reliability_a']:.2f} and "
            f"{here['reliability_b']:.2f}: noise alone keeps the plain cosine below "
            f"{here['ceiling']:.2f}",
            f"were the true cosine 0, the plain one would lie between {here['null_lower']:+.2f} and "
            f"{here['null_upper']:+.2f} (p {here['p_value']:.2g}, over all layers "
            f"{here['p_adjusted']:.2g})",
        ]

    def __repr__(self) -> str:
        cosine = float(self.similarities["refusal_vs_negativity"][self.layer])
        return (
            f"Results({self.model_name}, layer {self.layer}: cosine {cosine:+.4f}, "
            f"{self.verdict.answer})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(measure)}</td><td>{value:+.4f}</td>"
            f"<td>{html.escape(reading)}</td></tr>"
            for measure, value, reading in self.table()
        )
        reasons = "".join(
            f"<li>{html.escape(reason)}</li>"
            for reason in (*self.verdict.reasons, self.verdict.geometry)
        )
        sure = "<br>".join(map(html.escape, self.uncertainty()))
        return (
            f"<p><b>{html.escape(self.model_name)}</b>, {html.escape(self.layer_note)}</p>"
            f"<p>verdict: <b>{html.escape(self.verdict.answer)}</b></p><ul>{reasons}</ul><table>"
            "<tr><th>measure</th><th>cosine</th><th>the published rule would say</th></tr>"
            f"{rows}</table><p>{sure}</p>"
        )

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        display(HTML(self._repr_html_()))
        display(self.figure())


def config_of(path: str | Path) -> Config:
    """The configuration that repeats a run, from its `results.json`, or the folder that it is in.

    The prompts are the run's own, whatever the bundled ones are by now, and the model's revision is
    the one that was used.

    Raises:
        InputError: if the file is missing, damaged or of another format.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    document = artifacts.read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}: name a results.json of this version")
    try:
        saved = document["saved"]["fields"]
        parts = {"config": saved["config"], "contrasts": saved["contrasts"]}
        revision = document["provenance"]["model"].get("revision")
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} lacks the configuration of its run: save it anew") from None
    found = artifacts.unpack({"dict": parts}, {}, SAVED)
    config, contrasts = found["config"], found["contrasts"]
    if not isinstance(config, Config) or not isinstance(contrasts, dict):
        raise InputError(f"{path} lacks the configuration of its run: save it anew")
    try:
        refusal, negativity, *controls = contrasts.values()
        return replace(
            config,
            refusal=refusal,
            negativity=negativity,
            controls=tuple(controls),
            revision=config.revision or revision,
        )
    except (ValueError, TypeError):
        raise InputError(f"{path} lacks the contrasts of its run: save it anew") from None


def set_names(contrasts: Mapping[str, Contrast]) -> dict[str, tuple[str, str]]:
    """The names of the sides of the refusal and the negativity contrast, no two alike."""
    parts = ("refusal", "negativity")
    names = {part: (contrasts[part].target_name, contrasts[part].baseline_name) for part in parts}
    if len({name for pair in names.values() for name in pair}) < 4:
        names = {part: (f"{part}: {a}", f"{part}: {b}") for part, (a, b) in names.items()}
    return names


def _signed(value: Tensor) -> str:
    return f"{float(value):>+6.2f}" if value.isfinite() else f"{'?':>6}"


def at_layer(found: CosineStatistics, layer: int) -> dict[str, float]:
    """Everything that is known of the cosine at one layer, by name."""
    return {
        name: float(values[layer])
        for name, values in vars(found).items()
        if isinstance(values, Tensor)
    }
