"""The ways in which two contrasts were read, what each found, and how far each choice moves it."""

import csv
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from ..activations import disk as artifacts
from ..errors import InputError
from ..experiment.verdict import Verdict, published_rule
from ..prompts.protocol import Protocol

if TYPE_CHECKING:
    import plotly.graph_objects as go

OURS = "ours"
"""The name of the default protocol's specification, with every prompt."""

Rows = tuple[tuple[int, ...], ...]
"""Which prompts of each of the four sets: refusal's target and baseline, negativity's."""


@dataclass(frozen=True)
class Specification:
    """One way to read the two contrasts.

    Attributes:
        name: what is special about it, in words.
        family: "from published to ours", "one choice changed", "Arditi et al." or "subset".
        protocol: how prompts are read.
        rows: which prompts of the four sets.
    """

    name: str
    family: str
    protocol: Protocol
    rows: Rows

    @property
    def n_prompts(self) -> int:
        """Prompts in the smallest of the four sets."""
        return min(map(len, self.rows))

    def choices(self) -> dict[str, str]:
        """Every choice in words, the same keys for every specification."""
        p = self.protocol
        return {
            "padding": "none is read" if p.padding == "left" else "right, read at the last column",
            "BOS": "one" if p.bos == "once" else "two",
            "generation prompt": "yes" if p.generation_prompt else "no",
            "system prompt": "no" if p.system_prompt is None else "yes",
            "layer": "output of block" if p.hook == "resid_post" else "input of block",
            "position": str(p.positions[0]).replace("_", " "),
            "prompts a set": str(self.n_prompts),
        }


@dataclass(frozen=True)
class Change:
    """How far one choice, changed in ours, moves the plain cosine at the highlighted layer.

    `value` is what it becomes less what it is by ours; the interval is over prompts, which both
    readings share. For a number of prompts it is the central range over random subsets.
    """

    choice: str
    value: float
    lower: float
    upper: float
    becomes: float

    def __str__(self) -> str:
        return f"{self.choice}: {self.value:+.3f} [{self.lower:+.3f}, {self.upper:+.3f}]"


@dataclass(frozen=True)
class Sensitivity:
    """Every specification's cosine of the two directions at every layer; `print` shows it.

    Attributes:
        specifications: what was compared; the one named "ours" is the default protocol's.
        plain: cosine of the sampled directions, float64.
        unbiased: estimate of the true directions' cosine; NaN where there is a reason.
        lower: lower end of its interval.
        upper: upper end of its interval.
        reasons: why an estimate is NaN, by specification and layer; empty where it isn't.
        verdicts: on the directions of each specification, by layer, from what ablating and adding
            them does to the model as it is used.
        changes: how far each choice moves the cosine, the largest first.
        layer: the highlighted layer.
        confidence: of the intervals.
        provenance: model and contrasts.
    """

    specifications: tuple[Specification, ...]
    plain: Float[Tensor, "specification layer"]
    unbiased: Float[Tensor, "specification layer"]
    lower: Float[Tensor, "specification layer"]
    upper: Float[Tensor, "specification layer"]
    reasons: tuple[tuple[str, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    changes: tuple[Change, ...]
    layer: int
    confidence: float
    provenance: dict[str, Any]

    @property
    def ours(self) -> int:
        """Index of the default protocol with every prompt."""
        return next(i for i, s in enumerate(self.specifications) if s.name == OURS)

    def published_rule(self, specification: int, layer: int) -> str:
        """What the published rule reads into the plain cosine of one specification at a layer."""
        return published_rule(float(self.plain[specification, layer]))

    def sentence(self) -> str:
        """Which choice matters most, with its number and interval."""
        known = [change for change in self.changes if change.value == change.value]
        if not known:
            return f"At layer {self.layer} the cosine is not measurable, whatever is chosen."
        most = known[0]
        at_ours = float(self.plain[self.ours, self.layer])
        return (
            f"At layer {self.layer} the choice that matters most is this: {most.choice}. It moves "
            f"the cosine by {most.value:+.3f} [{most.lower:+.3f}, {most.upper:+.3f}], from "
            f"{at_ours:+.3f} to {most.becomes:+.3f}."
        )

    def scatter(self) -> str:
        """How far the cosine scatters if few prompts are read; empty without subsets."""
        few = [change for change in self.changes if change.choice.endswith("prompts a set")]
        if not few:
            return ""
        at_ours = float(self.plain[self.ours, self.layer])
        n = self.specifications[self.ours].n_prompts
        return (
            f"{few[0].choice} instead of {n} scatter it from {at_ours + few[0].lower:+.3f} to "
            f"{at_ours + few[0].upper:+.3f}, by which prompts they are alone."
        )

    def records(self) -> list[dict[str, Any]]:
        """The table: one row for every specification and layer."""
        rows = []
        for i, specification in enumerate(self.specifications):
            for layer in range(self.plain.shape[1]):
                numbers = {
                    name: artifacts.plain(float(getattr(self, name)[i, layer]))
                    for name in ("plain", "unbiased", "lower", "upper")
                }
                rows.append(
                    {
                        "specification": specification.name,
                        "family": specification.family,
                        **specification.choices(),
                        "layer": layer,
                        **numbers,
                        "why not": self.reasons[i][layer],
                        "verdict": self.verdicts[i][layer].answer,
                        "first reason": self.verdicts[i][layer].reasons[0],
                        "published reading": self.published_rule(i, layer),
                    }
                )
        return rows

    def figure(self, layer: int | None = None) -> "go.Figure":
        """The specification curve at a layer, the highlighted one unless another is named.

        Raises:
            InputError: if the model has no such layer.
        """
        from .. import plotting

        at = self.layer if layer is None else layer
        if not 0 <= at < self.plain.shape[1]:
            raise InputError(f"no layer {at}: choose 0 to {self.plain.shape[1] - 1}")
        choices = [specification.choices() for specification in self.specifications]
        return plotting.specification_curve(
            self.plain[:, at],
            interval=(self.lower[:, at], self.upper[:, at]),
            names=[s.name for s in self.specifications],
            families=[s.family for s in self.specifications],
            choices={name: [each[name] for each in choices] for name in choices[0]},
            outcomes={"verdict": [row[at].answer for row in self.verdicts]},
            reference=self.ours,
            subtitle=self.sentence(),
            title=f"The cosine at layer {at}, read in {len(choices)} ways",
        )

    def save(self, folder: str | Path) -> Path:
        """Write `sensitivity.csv`, `.json` and `.html` to a folder, whole files or none.

        Raises:
            InputError: if the folder can't be written.
        """
        rows = self.records()
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        document = {
            "sentence": self.sentence(),
            "scatter": self.scatter(),
            "layer": self.layer,
            "confidence": self.confidence,
            "changes": artifacts.plain(self.changes),
            "specifications": [
                {"name": s.name, "family": s.family, "protocol": s.protocol.to_dict()}
                | {"faults": list(s.protocol.bugs), "rows": artifacts.plain(s.rows)}
                for s in self.specifications
            ],
            "provenance": artifacts.plain(self.provenance),
            "table": rows,
            "evidence": [
                [artifacts.plain(verdict.evidence) for verdict in row] for row in self.verdicts
            ],
        }
        page = self.figure().to_html(include_plotlyjs=True, full_html=True)
        with artifacts.whole_directory(folder) as staging:
            (staging / "sensitivity.csv").write_text(text.getvalue(), "utf-8")
            artifacts.write_json(staging / "sensitivity.json", document)
            (staging / "sensitivity.html").write_text(page, "utf-8")
        return Path(folder)

    def table(self) -> list[tuple[str, str, str, str, str, str]]:
        """At the highlighted layer: family, name, cosine, interval, verdict, published reading."""
        rows: list[tuple[str, str, str, str, str, str]] = []
        for i, specification in enumerate(self.specifications):
            low, high = (float(end[i, self.layer]) for end in (self.lower, self.upper))
            rows.append(
                (
                    specification.family,
                    specification.name,
                    f"{float(self.plain[i, self.layer]):+.3f}",
                    f"[{low:+.2f}, {high:+.2f}]" if low == low else "not known",
                    self.verdicts[i][self.layer].answer,
                    self.published_rule(i, self.layer),
                )
            )
        return rows

    def __str__(self) -> str:
        width = max(len(row[1]) for row in self.table())
        lines = [self.sentence(), self.scatter(), ""]
        family = ""
        for row in self.table():
            if row[0] != family:
                family = row[0]
                lines.append(family)
            lines.append(f"  {row[1]:<{width}}  {row[2]}  {row[3]:<16}  {row[4]:<13}  {row[5]}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Sensitivity({len(self.specifications)} specifications, layer {self.layer})"

    def _repr_html_(self) -> str:
        interval = f"{self.confidence:.0%} interval"
        head = ("", "specification", "cosine", interval, "verdict", "published rule")
        cells = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.table()
        )
        return (
            f"<p>{html.escape(self.sentence())} {html.escape(self.scatter())}</p><table><tr>"
            + "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            + f"</tr>{cells}</table>"
        )
