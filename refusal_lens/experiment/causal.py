"""Run the model while the two directions are ablated and added."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.extract import ContrastActivations
from ..activations.progress import RunBar
from ..directions.estimators import mean_difference
from ..interventions import (
    CrossEffects,
    Effects,
    ReplyOpenings,
    ablation_effects,
    cross_effects,
    openings_of,
)
from ..interventions.batched_runs import Interventions, first_token_logits, opening_log_odds
from ..interventions.cross_ablation import N_PARTS, outside, random_directions, sampled
from ..interventions.doses import DOSES, N_PROMPTS, DoseResponse, dose_response
from ..interventions.reply_openings import ANSWERING, REFUSAL, SYMPATHY
from ..interventions.sweep import affine_references, measured
from ..models.forward import effective_unembedding
from ..models.load import tokenizer_of
from ..prompts.contrast import Contrast
from .config import Config, some_prompts, spread
from .distributed import divide, in_shares

if TYPE_CHECKING:
    from ..models import HookedModel

EFFECT_PROMPTS = 32  # prompts of each set on which directions are ablated and added
FEW_PROMPTS = 8  # the same where nothing is refused, and for scores of sympathy and answers
FEWEST_PROMPTS = 4  # smallest set on which interventions run
CELLS_AT_ONCE = 256  # cells of a sweep that are stored together
N_RANDOM = 20  # random directions, ablated and added for comparison
MOST_DIRECTIONS = 3  # of refusal, ablated together where one does not let requests through
DEEPEST = 0.8  # share of the layers among which one is chosen, as Arditi et al. do
PARTS = ("refusal", "negativity")
NUISANCES = ("arousal", "alarm")  # concepts that are taken out of negativity
CONTROLLED = "what controls leave of it"
SETS = ("harmful", "harmless", "negative", "neutral")


@dataclass(frozen=True)
class Causal:
    """The effects of the interventions.

    Attributes:
        openings: the openings that count as a refusal.
        highlighted: the highlighted layer, which need not be the judged one (`ablation.layer`).
        n_prompts: most prompts of each set in `ablation` and `addition`: 32, or 8 without random
            directions if no harmful prompt is refused. The verdict is then inconclusive.
        requests: refusal log-odds of all harmful and of all harmless prompts, unmodified.
        replies: prompt set ("harmful", "harmless", "negative", "neutral") -> kind of reply
            ("refusal", "sympathy", "answer") -> mean probability in the unmodified model.
        sweep: part -> scores of harmful prompts under affine ablation of each layer's direction, by
            the openings' first tokens alone. These prompts are others than those of `ablation` and
            `addition`, as far as there are others.
        controlled_sweep: the same for negativity without what controls have; None without controls.
        strongest: layer, of the first 80 %, whose refusal direction lowers these scores most; -1 if
            unknown.
        several: orthogonal directions of `ablation.layer`, ablated together as refusal.
        ablation, addition: effects of ablating and adding the directions of the judged layer.
        constant_token: text of a token, no refusal's first, with which every reply begins; or "".
        words_alike: overlap of the openings that refuse harmful and negative prompts (`words_alike`).
        doses: effects of growing doses of the two directions; None unless asked for.
    """

    openings: ReplyOpenings
    highlighted: int
    n_prompts: int
    requests: tuple[Float[Tensor, " harmful"], Float[Tensor, " harmless"]]
    replies: dict[str, dict[str, float]]
    sweep: dict[str, Effects]
    controlled_sweep: Effects | None
    strongest: int
    several: Float[Tensor, "several d_model"]
    ablation: CrossEffects
    addition: CrossEffects
    constant_token: str = ""
    words_alike: float = math.nan
    doses: DoseResponse | None = None


def intervene(
    model: "HookedModel",
    contrasts: Mapping[str, Contrast],
    activations: Mapping[str, ContrastActivations],
    *,
    layer: int,
    config: Config,
    bar: RunBar,
) -> Causal:
    """Measure refusal scores while the refusal and negativity directions are ablated and added.

    The layer is `judged_layer`'s. Processes divide the layers of the sweeps, and the cross-effects.

    Args:
        model, contrasts, activations: the model, and prompts and activations of both contrasts.
        layer, config, bar: the highlighted layer, every choice, and the run's bar with `steps`.
    """
    bar.begin("scoring requests")
    sides = activations["refusal"], activations["negativity"]
    score = openings_of(tokenizer_of(model), config.refusal_openings or REFUSAL)
    options: Any = {"protocol": config.protocol, "batch_size": config.batch_size, "progress": bar}
    odds = request_scores(model, contrasts["refusal"], score, options)
    n_prompts, n_random = (EFFECT_PROMPTS, N_RANDOM) if (odds[0] > 0).any() else (FEW_PROMPTS, 0)
    pair = [some_prompts(contrasts[part], n_prompts) for part in PARTS]
    others = other_prompts(contrasts["refusal"], n_prompts)
    spans = taken_out(model, activations, score)
    sweeps, controlled = _sweeps(model, contrasts, activations, others, score, spans, options)
    highlighted, layer = layer, judged_layer(sweeps["refusal"], layer)
    several = refusal_directions(model, others, sides[0], layer, score, options)
    given = options | {"layer": layer, "score": score, "taken_out": [x[layer] for x in spans]}
    classes = [side[:, layer] for both in sides for side in both]
    generator = torch.Generator().manual_seed(config.seed)
    draw = partial(random_directions, *classes, n=n_random, generator=generator)

    def cross(kind: Any, random: Tensor) -> CrossEffects:
        bar.begin(kind)
        these = given | {"intervention": kind, "random": random, "several": several}
        return cross_effects(model, (pair[0], pair[1]), sides, **these)

    tasks: list[Any] = [partial(cross, kind, draw()) for kind in ("ablation", "addition")]
    shared = options | {"layer": layer, "score": score, "generator": generator}
    tasks += [partial(_dosed, model, contrasts, activations=sides, **shared)] * config.doses
    ablation, addition, *doses = divide(tasks)
    bar.begin("scoring replies")
    return Causal(
        openings=score,
        highlighted=highlighted,
        n_prompts=n_prompts,
        requests=odds,
        replies=_replies(model, pair, ablation, options),
        sweep=sweeps,
        controlled_sweep=controlled,
        strongest=strongest_layer(sweeps["refusal"]),
        several=several,
        ablation=ablation,
        addition=addition,
        constant_token=constant_token(model, pair, score, options),
        words_alike=words_alike(model, pair, ablation.unmodified[::2], score, options),
        doses=doses[0] if doses else None,
    )


def _sweeps(
    model: "HookedModel",
    contrasts: Mapping[str, Contrast],
    activations: Mapping[str, ContrastActivations],
    requests: Contrast,
    score: ReplyOpenings,
    spans: Sequence[Tensor],
    options: dict[str, Any],
) -> tuple[dict[str, Effects], Effects | None]:
    """`Causal.sweep` and `Causal.controlled_sweep`."""
    quick = options | {"score": score.first_tokens, "last_position": True}

    def sweep(what: str, directions: Tensor) -> Effects:
        options["progress"].begin(f"ablating {what}, every layer")
        references = activations["refusal"].baseline
        return sweep_ablations(model, requests.target, directions, references, options=quick)

    every = {part: mean_difference(*activations[part]).float() for part in PARTS}
    sweeps = {part: sweep(contrasts[part].name, each) for part, each in every.items()}
    alone = [*map(outside, every["negativity"], spans[-1])]
    return sweeps, sweep(CONTROLLED, torch.stack(alone)) if len(spans) > 1 else None


def _dosed(model: Any, contrasts: Mapping[str, Contrast], **options: Any) -> DoseResponse:
    """`Causal.doses`."""
    options["progress"].begin("doses")
    return dose_response(model, *(contrasts[part] for part in PARTS), **options)


def steps(contrasts: Mapping[str, Contrast], n_layers: int, *, doses: bool) -> dict[str, int]:
    """Return the steps of `intervene`, and how often each runs a prompt at most."""
    sides = [side for part in PARTS for side in (contrasts[part].target, contrasts[part].baseline)]
    n = min(EFFECT_PROMPTS, max(map(len, sides)))
    some = len(sampled(range(n)))
    found = {"scoring requests": len(sides[0]) + len(sides[1])}
    swept = [contrasts[part].name for part in PARTS]
    swept += [CONTROLLED] if {*NUISANCES} & {*contrasts} else []
    found |= {f"ablating {name}, every layer": n * n_layers for name in swept}
    found["ablation"] = 2 * ((N_PARTS + 4) * n + (2 + N_RANDOM) * some)
    found["addition"] = 2 * N_PARTS * n + N_RANDOM * some
    found |= {"doses": 3 * N_PROMPTS * len(DOSES) * (2 + N_RANDOM)} if doses else {}
    return found | {"scoring replies": 4 * n + 8 * min(n, FEW_PROMPTS)}


def other_prompts(contrast: Contrast, n: int) -> Contrast:
    """Up to `n` prompts a side that `some_prompts` leaves out; its own where it leaves out too few."""
    rows = [range(len(side)) for side in (contrast.target, contrast.baseline)]
    left = [sorted({*each} - {*spread(each, n)}) for each in rows]
    few = min(map(len, left)) < FEW_PROMPTS
    return some_prompts(contrast if few else contrast.subset(*left), n)


def deepest(n_layers: int) -> int:
    """How many layers, from the first on, one is chosen among."""
    return max(1, int(DEEPEST * n_layers))


def strongest_layer(sweep: Effects) -> int:
    """The layer, of the first 80 %, at which ablating refusal does most; -1 if unknown."""
    means = sweep.log_odds[: deepest(len(sweep.log_odds))].mean(-1)
    return -1 if means.isnan().all() else int(means.nan_to_num(nan=torch.inf).argmin())


def judged_layer(sweep: Effects, layer: int) -> int:
    """The layer whose directions are judged: `layer`, if ablating refusal there lets requests through.

    Else it is the strongest layer, if it does more. The prompts of the sweep are not those on which
    the effects are measured (cross-fitting).
    """
    refused = (~(sweep.log_odds <= 0)).double().mean(-1)  # an unknown score counts as refused
    best = strongest_layer(sweep)
    enough = (sweep.unchanged > 0).double().mean() / 2
    return layer if refused[layer] <= enough or refused[best] >= refused[layer] else best


def refusal_directions(
    model: "HookedModel",
    requests: Contrast,
    sides: ContrastActivations,
    layer: int,
    score: ReplyOpenings,
    options: dict[str, Any],
) -> Float[Tensor, "several d_model"]:
    """Orthogonal directions of one layer, each of what still refuses while those before are ablated.

    The first is the mean difference. Another is the mean of the harmful prompts that are still
    refused less that of harmless ones, while over half of the refusal is left.
    """
    found = mean_difference(*sides)[layer, None].float()
    prompts, n = requests.target + requests.baseline, len(requests.target)
    read = options | {"read_layers": [layer], "progress": False}
    while len(found) < MOST_DIRECTIONS and found.isfinite().all():
        references = affine_references(found, sides.baseline, hook=options["protocol"].hook)
        these = Interventions(found[None], None, references[None], last_position=True)
        run = [(these, [0], range(len(prompts)))]
        log_odds, _, stream = measured(model, prompts, run, 2, score, read)
        before, after = log_odds[:, :n] > 0
        if after.sum() < FEWEST_PROMPTS or after.sum() <= before.sum() / 2:
            break
        left = stream[1, :n, 0][after].mean(0) - stream[1, n:, 0].mean(0)
        found = torch.cat([found, outside(left, found)[None]])
    return found


def taken_out(
    model: "HookedModel",
    activations: Mapping[str, ContrastActivations],
    score: ReplyOpenings,
) -> list[Float[Tensor, "layer _ d_model"]]:
    """Rows that controls take out of negativity at each layer; `cross_effects` is given one layer's.

    First the unembeddings of the refusals' first tokens alone, then these with the directions of
    arousal and alarm, if there are activations of one of them.
    """
    unembedding = effective_unembedding(model).T
    first = unembedding[[*score.first_tokens]] - unembedding.mean(0)
    found = [activations[name] for name in NUISANCES if name in activations]
    controls = [mean_difference(*each).float()[:, None] for each in found]
    first = first.expand(model.cfg.n_layers, -1, -1)
    return [first, torch.cat([first, *controls], dim=1)] if controls else [first]


def sweep_ablations(
    model: "HookedModel",
    prompts: Sequence[str],
    directions: Float[Tensor, "*cell d_model"],
    baseline: Float[Tensor, "baseline layer d_model"],
    options: dict[str, Any],
    **kept: Any,
) -> Effects:
    """Return the effect of the affine ablation of each direction; processes divide the directions.

    `baseline` are the activations that components are set to; `options` are `ablation_effects`'s,
    and `kept` are `divide_sweep`'s.
    """

    def effects(some: Tensor, references: Tensor) -> Effects:
        return ablation_effects(model, prompts, some, references=references, **options)

    references = affine_references(directions, baseline, hook=options["protocol"].hook)
    return divide_sweep(effects, directions, references, **kept)


def request_scores(model: Any, contrast: Contrast, score: ReplyOpenings, options: Any) -> Any:
    """Log-odds of a refusal behind every target prompt, and behind every baseline prompt."""
    sides = contrast.target, contrast.baseline
    return opening_log_odds(model, sum(sides, ()), score, **options).split([*map(len, sides)])


def constant_token(
    model: "HookedModel",
    pair: Sequence[Contrast],
    refusal: ReplyOpenings,
    options: dict[str, Any],
) -> str:
    """A token that begins every reply (probability 0.99 or more), but no refusal; else "".

    Where there is one, `<think>` for instance, the first token says nothing about refusal.
    """
    sets = [side for contrast in pair for side in (contrast.target, contrast.baseline)]
    least = first_token_logits(model, sum(sets, ()), **options).float().softmax(-1).amin(0)
    token = int(least.argmax())
    begins = least[token] >= 0.99 and token not in refusal.first_tokens
    return tokenizer_of(model).decode([token]) if begins else ""


def words_alike(
    model: "HookedModel",
    contrasts: Sequence[Contrast],
    log_odds: Sequence[Float[Tensor, " target"]],
    score: ReplyOpenings,
    options: dict[str, Any],
) -> float:
    """Overlap of the openings with which the model refuses targets of two contrasts.

    1 is the same openings equally often, 0 none in common; NaN where fewer than four of either are
    refused, by their `log_odds`.
    """
    both = zip([x.target for x in contrasts], log_odds, strict=True)
    refused = [[x for x, odds in zip(*each, strict=True) if odds > 0] for each in both]
    if min(map(len, refused)) < FEWEST_PROMPTS:
        return math.nan
    some = [spread(each, FEW_PROMPTS) for each in refused]
    texts = dict.fromkeys(text.replace("’", "'") for text in score.texts)
    openings = [openings_of(tokenizer_of(model), [text]) for text in texts]
    options = options | {"progress": False}
    found = [opening_log_odds(model, [*chain(*some)], each, **options) for each in openings]
    sides = torch.stack(found).sigmoid().split([*map(len, some)], dim=1)
    return float(torch.minimum(*(x.mean(-1) / x.mean(-1).sum() for x in sides)).sum())


def _replies(
    model: "HookedModel",
    pair: Sequence[Contrast],
    effects: CrossEffects,
    options: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """Mean probability of every kind of reply after each prompt set, in the unmodified model."""
    tokenizer: Any = model.tokenizer
    found = {
        name: {"refusal": float(each[spread(range(len(each)), FEW_PROMPTS)].sigmoid().mean())}
        for name, each in zip(SETS, effects.unmodified, strict=True)
    }
    some = [some_prompts(contrast, FEW_PROMPTS) for contrast in pair]
    sides = [side for contrast in some for side in (contrast.target, contrast.baseline)]
    for kind, texts in (("sympathy", SYMPATHY), ("answer", ANSWERING)):
        odds = opening_log_odds(model, sum(sides, ()), openings_of(tokenizer, texts), **options)
        for name, each in zip(SETS, odds.sigmoid().split([*map(len, sides)]), strict=True):
            found[name][kind] = float(each.mean())
    return found


def divide_sweep(
    effects: Callable[..., Effects],
    *each: Tensor,
    remember: Callable[..., list[Effects]] = lambda cells, run: run(),
) -> Effects:
    """Return `effects(*each)`, `[*cell prompt]`. Processes divide the cells; equal ones run once.

    `remember(cells, run)` returns what is stored for the hash of some cells, or stores `run()`.
    """
    shape = each[0].shape[:-1]
    flat = [tensor.flatten(0, len(shape) - 1) for tensor in each]
    cells = [b"".join(x.numpy().tobytes() for x in cell) for cell in zip(*flat, strict=True)]
    rows = {cell: i for i, cell in enumerate(cells)}
    places: dict[bytes, tuple[Effects, int]] = {}
    for start in range(0, len(rows), CELLS_AT_ONCE):
        some = [*rows][start : start + CELLS_AT_ONCE]
        here = [rows[cell] for cell in some]
        own = partial(lambda here, share: effects(*(x[here[share]] for x in flat)), here)
        parts = remember(sha256(b"".join(some)).hexdigest(), partial(in_shares, own))
        places |= {cell: (parts[i % len(parts)], i // len(parts)) for i, cell in enumerate(some)}
    found = [places[cell] for cell in cells]
    log_odds = torch.stack([part.log_odds[i] for part, i in found]).unflatten(0, shape)
    kl = torch.stack([part.kl[i] for part, i in found]).unflatten(0, shape)
    return replace(found[0][0], log_odds=log_odds, kl=kl)


def smallest_set(contrasts: Mapping[str, Contrast]) -> int:
    """Return the number of prompts in the smallest of the four sets."""
    return min(len(side) for p in PARTS for side in (contrasts[p].target, contrasts[p].baseline))
