"""Doses of a direction, compared at equal next-token KL on harmless prompts, not at equal norm."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, pad

from .. import plotting
from ..activations.extract import extract
from ..directions.estimators import mean_difference
from ..models.load import tokenizer_of
from ..prompts.contrast import Contrast
from ..uncertainty.effects import Interval, mean_interval
from .cross_ablation import Sides, check_sides, random_directions
from .reply_openings import ReplyOpenings, openings_of
from .sweep import addition_effects

if TYPE_CHECKING:
    from ..models import HookedModel

SIGNS = {"added": 1, "taken away": -1}
DOSES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
KLS = (0.01, 0.03, 0.1, 0.3, 1.0)
N_PROMPTS, N_RANDOM = 16, 20
MOVED = 0.1  # nats; a smaller change may be rounding


@dataclass(frozen=True, repr=False, eq=False)
class DoseResponse:
    """Effects of doses of two directions and, behind them, of random ones.

    Attributes:
        layer, names, doses: the directions' layer, the names of the two, and the multiples from 0 on.
        log_odds: "added" -> refusal log-odds of harmless prompts with a dose added, "taken away" ->
            of harmful prompts with a dose subtracted, `[direction dose prompt]`.
        kl: the same keys -> next-token KL of harmless prompts in nats, `[direction dose prompt]`.
        gap: share of harmful prompts refused less that of harmless ones, unmodified.
    """

    layer: int
    names: tuple[str, ...]
    doses: tuple[float, ...]
    log_odds: dict[str, Float[Tensor, "direction dose _prompt"]]
    kl: dict[str, Float[Tensor, "direction dose harmless"]]
    gap: float

    def effects(self, way: str) -> dict[str, Interval]:
        """Means over prompts, `[direction dose]`, with 95 % intervals.

        "refused": share of prompts; "change": of the log-odds, in nats; "wrong way": share whose
        log-odds fall by over 0.1 when a direction is added, or rise when it is taken away.
        """
        change = self.log_odds[way] - self.log_odds[way][:, :1]
        each = {"refused": (self.log_odds[way] > 0).double(), "change": change}
        each["wrong way"] = (SIGNS[way] * change < -MOVED).double()
        return {name: mean_interval(values) for name, values in each.items()}

    def to_pandas(self, kls: Sequence[float] = KLS) -> Any:
        """Dose at half effect, and effects at equal KL, beside the band of random directions.

        Half effect is half the `gap`. An effect at a KL is that of the first dose that costs it,
        linear between doses. NaN where no dose gets there, or less than half of the random ones.
        """
        import pandas as pd

        rows = {}
        for way, sign in SIGNS.items():
            effects, cost = self.effects(way), self.kl[way].mean(-1).sqrt()  # linear in the dose
            closed = sign * (effects["refused"].value - effects["refused"].value[:, :1])
            half = self.gap / 2 if self.gap > 0 else np.nan
            rows[way, "dose at half effect", np.nan] = _first_dose(self.doses, closed, half)
            for name, kl in product(effects, kls):
                at = zip(_first_dose(self.doses, cost, kl**0.5), effects[name].value, strict=True)
                rows[way, name, kl] = [np.interp(dose, self.doses, row) for dose, row in at]
        table = pd.DataFrame(rows).T.rename_axis(["way", "effect", "KL"])
        found, random = table.iloc[:, :2].set_axis([*self.names], axis=1), table.iloc[:, 2:]
        for name, q in {"random: median": 0.5, "2.5 %": 0.025, "97.5 %": 0.975}.items():
            found[name] = random.quantile(q, axis=1).where(random.notna().mean(axis=1) >= 0.5)
        return found.reset_index()

    def __repr__(self) -> str:
        return self.to_pandas([0.1]).to_string(index=False, float_format="{:.2f}".format)

    def figure(self, way: str, **options: Any) -> Any:
        """The share refused over KL, beside random directions; `theme` is "light" or "dark"."""
        kls, names = torch.logspace(-3, 1, 25), (*self.names, "random (null)")
        table = self.to_pandas(kls.tolist()).query("way == @way and effect == 'refused'")
        middle, *ends = torch.tensor(table.iloc[:, -3:].to_numpy()).T
        shares, *sides = (end[:2, 1:].clamp(0, 1) for end in self.effects(way)["refused"])
        costs, around = self.kl[way][:2, 1:].mean(-1), [*zip(*sides, strict=True)]
        return plotting.dose_response(
            dict(zip(names, (*shares, middle), strict=True)),
            dict(zip(names, (*costs, kls), strict=True)),
            interval=dict(zip(names, (*around, tuple(ends)), strict=True)),
            title=f"Share refused with layer {self.layer}'s directions {way}",
            **options,
        )


def _first_dose(doses: Sequence[float], curves: Tensor, level: float) -> list[float]:
    """The dose at which each curve `[dose]` first reaches a level above its start; or NaN."""
    found = []
    for row in curves.tolist():
        i = next((i for i, value in enumerate(row) if value >= level), 0)
        found.append(np.interp(level, row[i - 1 : i + 1], doses[i - 1 : i + 1]) if i else np.nan)
    return found


def dose_response(
    model: "HookedModel",
    refusal: Contrast,
    negativity: Contrast,
    *,
    layer: int,
    generator: torch.Generator,
    activations: Sequence[Sides] | None = None,
    score: ReplyOpenings | None = None,
    **options: Any,
) -> DoseResponse:
    """Add doses of two directions to harmless prompts, and take them away from harmful ones.

    >>> found = dose_response(model, "refusal", "negativity", layer=20, progress=False)
    >>> table, shown = found.to_pandas(), found.figure("added")

    A dose, 0.25 to 8 times the difference of means, is added after its layer at the last token,
    where it was read. Dose 1 of refusal, taken away, moves the mean of harmful prompts to that of
    harmless ones, as affine ablation does. The doses grade that, and move other directions as far.

    Args:
        model, refusal, negativity: the model, without hooks, and contrasts of four prompts a side or
            more, else InputError. Up to 16 a side of `refusal` get the doses.
        layer: the layer of the directions; InputError if the model has no such layer.
        generator: source of 20 random directions, of negativity's norm and the sets' covariance.
        activations, score: activations of both contrasts, and the openings of refusals; None reads
            them, and takes the bundled ones.
        **options: `protocol`, `batch_size` and `progress` of `get_layer_activations`.
    """
    sides = [side for each in (refusal, negativity) for side in (each.target, each.baseline)]
    check_sides(sides, layer, model.cfg.n_layers)
    read = activations or extract(model, [refusal, negativity], **options).values()
    classes = [[side[:, layer] for side in pair] for pair in read]
    whole = [mean_difference(*(side[:, None] for side in pair))[0].float() for pair in classes]
    random = random_directions(
        *(side for pair in classes for side in pair), n=N_RANDOM, generator=generator
    )
    directions = torch.stack([*whole, *normalize(random, dim=-1) * whole[1].norm()])
    scaled = torch.tensor(DOSES)[:, None] * directions[:, None]
    harmful, harmless = (side[:: max(1, len(side) // N_PROMPTS)][:N_PROMPTS] for side in sides[:2])
    score = score or openings_of(tokenizer_of(model))
    options |= {"layers": torch.tensor(layer), "last_position": True}
    run: Any = partial(addition_effects, model, **options)
    both = run(harmless, scaled, score=score), run(harmful, -scaled, score=score)
    kl = both[0].kl, run(harmless, -scaled, score=score.first_tokens).kl
    starts = [each.unchanged.expand(len(scaled), 1, -1) for each in both]
    odds = [torch.cat([a, b.log_odds], dim=1) for a, b in zip(starts, both, strict=True)]
    answered, refused = ((start[0] > 0).double().mean() for start in starts)
    return DoseResponse(
        layer=layer,
        names=(refusal.name, negativity.name),
        doses=(0.0, *DOSES),
        log_odds=dict(zip(SIGNS, odds, strict=True)),
        kl=dict(zip(SIGNS, [pad(each, (0, 0, 1, 0)) for each in kl], strict=True)),
        gap=float(refused - answered),
    )
