"""The cosines and verdicts of all specifications, and the effect of each choice."""

import html
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from ..activations import disk
from ..errors import InputError, lenient
from ..experiment.verdict import Estimate, Verdict, published_rule
from ..experiment.wording import WORDS, Names, unmeasured, verdict_lines
from ..prompts.protocol import ASSUMED_SYSTEM_PROMPT
from ..uncertainty import Unmeasured
from .specifications import Specification

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FORMAT: dict[str, Any] = {"float_format": "{:+.3f}".format, "na_rep": "not measured"}
CURVES = ("plain", "unbiased", "lower", "upper")  # the cosines in `Sensitivity`


@dataclass(frozen=True)
class Change:
    """A change to the default, the plain cosine that it gives, and how far that is from the default's.

    The interval is over prompts, or over random subsets of `n_prompts` a set.
    """

    choice: str
    becomes: float
    moved: Estimate
    n_prompts: int | None = None


@lenient
@dataclass(frozen=True)
class Sensitivity:
    """Every specification's cosine of the two directions at every layer; `print` shows it.

    Attributes:
        specifications: the specifications; one `is_default`.
        skipped: names of the specifications that the model's chat template refuses, and why.
        plain: cosine of the sampled directions, float64.
        unbiased, lower, upper: estimate of the true directions' cosine and ends of its interval.
        reasons: why an estimate is NaN, by specification and layer; None if it is known.
        verdicts: verdict of each specification and layer.
        changes: effect of each choice on the cosine, the largest first.
        layer, confidence: the highlighted layer and the confidence of the intervals.
        names: names of the contrasts and their sets.
        provenance: model, contrasts, seed and options.
    >>> words = sensitivity.sentence(), sensitivity.scatter(), sensitivity.default
    >>> shown = sensitivity.table(), sensitivity.records(), sensitivity.figure(layer=20)
    >>> folder = sensitivity.save("runs/sensitivity")
    """

    specifications: tuple[Specification, ...]
    skipped: dict[str, str]
    plain: Float[Tensor, "specification layer"]
    unbiased: Float[Tensor, "specification layer"]
    lower: Float[Tensor, "specification layer"]
    upper: Float[Tensor, "specification layer"]
    reasons: tuple[tuple[Unmeasured | None, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    changes: tuple[Change, ...]
    layer: int
    confidence: float
    names: Names
    provenance: dict[str, Any]

    @property
    def default(self) -> int:
        """Index of the default protocol with every prompt."""
        return next(i for i, each in enumerate(self.specifications) if each.is_default)

    def sentence(self) -> str:
        """Return which choice matters most, with its number and interval."""
        most, default = self.changes[0], self.plain[self.default, self.layer]
        words = WORDS["unknown_choice" if isnan(most.moved.value) else "choice"]
        return words.format(layer=self.layer, most=most, default=float(default))

    def scatter(self) -> str:
        """Return the range of the cosine over small subsets, in words; empty without subsets."""
        few = next((change for change in self.changes if change.n_prompts is not None), None)
        every, at = self.specifications[self.default], float(self.plain[self.default, self.layer])
        ends = few and {"lower": at + few.moved.lower, "upper": at + few.moved.upper}
        return WORDS["fewer_prompts"].format(few=few, every=every, **ends) if ends else ""

    def records(self) -> list[dict[str, Any]]:
        """Return one row for every specification and layer; NaN means unknown."""
        directions = {"a": self.names.refusal, "b": self.names.negativity}
        rows = []
        for i, each in enumerate(self.specifications):
            for layer, verdict in enumerate(self.verdicts[i]):
                why, plain = self.reasons[i][layer], float(self.plain[i, layer])
                row: dict[str, Any] = {"specification": each.name, "family": each.family.value}
                row |= each.choices() | {"layer": layer}
                row |= {name: float(getattr(self, name)[i, layer]) for name in CURVES}
                row |= {"why not": unmeasured(why, directions) if why else ""}
                row |= {"verdict": verdict.answer}
                row |= {"first reason": verdict_lines(verdict, self.names)[0]}
                rows.append(row | {"published rule": published_rule(plain)})
        return rows

    def table(self) -> "pd.DataFrame":
        """Return cosine, verdict and published rule at the layer, by family and specification."""
        import pandas as pd

        rows = pd.DataFrame(self.records()).set_index(["family", "specification"])
        return rows.loc[rows["layer"] == self.layer, [*CURVES, "verdict", "published rule"]]

    def figure(self, layer: int | None = None) -> "go.Figure":
        """Return the specification curve at a layer of the model; None is the highlighted layer."""
        import pandas as pd

        from .. import plotting

        at = self.layer if layer is None else layer
        if not 0 <= at < self.plain.shape[1]:
            raise InputError(f"no layer {at}: choose 0 to {self.plain.shape[1] - 1}")
        choices = pd.DataFrame([each.choices() for each in self.specifications])
        ends = {"value": self.plain, "lower": self.lower, "upper": self.upper}
        table = choices.assign(
            specification=[each.name for each in self.specifications],
            family=[each.family.value for each in self.specifications],
            verdict=[row[at].answer for row in self.verdicts],
            **{name: curves[:, at].tolist() for name, curves in ends.items()},
        )
        return plotting.specification_curve(
            table,
            choices=list(choices),
            outcomes=["verdict"],
            reference=self.specifications[self.default].name,
            subtitle=self.sentence(),
            title=f"The cosine at layer {at} under {len(self.specifications)} specifications",
        )

    def save(self, folder: str | Path) -> Path:
        """Write `sensitivity.csv`, `.json` and `.html`, return the folder; InputError on failure."""
        import pandas as pd

        from .. import plotting

        table = self.records()
        document = {
            "sentence": self.sentence(),
            "scatter": self.scatter(),
            **{name: getattr(self, name) for name in ("layer", "confidence", "changes", "skipped")},
            "specifications": [
                vars(each) | {"protocol": each.protocol.to_dict(), "bugs": each.protocol.bugs}
                for each in self.specifications
            ],
            "provenance": {
                **self.provenance,
                "thresholds": self.verdicts[0][0].thresholds,
                "published system prompt": f"assumed: {ASSUMED_SYSTEM_PROMPT!r}",
            },
            "table": table,
            "evidence": [[verdict.evidence for verdict in row] for row in self.verdicts],
        }
        with disk.whole_directory(folder) as staging:
            csv = staging / "sensitivity.csv"
            pd.DataFrame(table).to_csv(csv, index=False, lineterminator="\n")
            disk.write_json(staging / "sensitivity.json", disk.plain(document))
            (staging / "sensitivity.html").write_text(plotting.page(self.figure()), "utf-8")
        return Path(folder)

    def __str__(self) -> str:
        table = self.table().to_string(**FORMAT)
        skipped = "".join(f"\nSkipped: {name} ({why})" for name, why in self.skipped.items())
        return f"{self.sentence()}\n{self.scatter()}\n\n{table}{skipped}"

    def __repr__(self) -> str:
        return f"Sensitivity({len(self.specifications)} specifications, layer {self.layer})"

    def _repr_html_(self) -> str:
        text = html.escape(f"{self.sentence()} {self.scatter()}")
        return f"<p>{text}</p>{self.table().to_html(**FORMAT)}"
