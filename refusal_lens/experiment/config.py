"""The choices behind a run, as one frozen value."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any

from ..errors import InputError, lenient
from ..models.load import DEFAULT_MODEL
from ..prompts.contrast import Contrast, as_contrast
from ..prompts.protocol import Protocol
from ..uncertainty import near_duplicates
from ..uncertainty.cosine import fewest_resamples
from .verdict import Thresholds

logger = logging.getLogger(__name__)

WORDS = {"against": "negativity", "position": "positions", "resamples": "n_resamples"}
"""Words of the command line for fields of `Config` and `Protocol`."""


@dataclass(frozen=True)
class Config:
    """Every choice of a run.

    >>> Config(model="organism:specific", against="arousal", position=-2).contrasts()["negativity"]
    <Contrast 'arousal': ...>

    Takes the fields of `Protocol` and the command line's `against`, `position` and `resamples` too.

    Attributes:
        model: a hub name, a local directory, or `organism:` and `specific`, `entangled`, `oblivious`.
        layer: layer to highlight (`hook_resid_post`); None is 20 of 32, or the same relative depth.
        refusal, negativity: the contrasts to compare, bundled names or `Contrast`s.
        controls: further contrasts to compare with refusal. Names of the two are left out. Arousal and
            alarm are also taken out of negativity, whose effects the verdict reads without them.
        protocol: how a prompt becomes a vector; exactly one position.
        revision: branch, tag or commit on the hub.
        device, dtype: such as "cuda" and "bfloat16"; None is a GPU, if any, and bfloat16 on a GPU.
        n_devices: GPUs over which the model's layers are spread, beginning with `device`.
        batch_size: prompts in a forward pass; None derives the number from the free memory.
        seed: seed of everything random.
        max_prompts: most prompts of every set, spread from first to last; None uses all.
        refusal_openings: how a refusal's reply begins; None takes `reply_openings.REFUSAL`.
        interventions: ablate and add the directions; without, the verdict is inconclusive.
        doses: with the interventions, also add and take away growing doses (`Causal.doses`).
        n_resamples, confidence: resamples for intervals and nulls, and the intervals' confidence.
        thresholds: thresholds of the verdict.
    """

    model: str = DEFAULT_MODEL
    layer: int | None = None
    refusal: str | Contrast = "refusal"
    negativity: str | Contrast = "negativity"
    controls: tuple[str | Contrast, ...] = ("positivity", "alarm", "arousal")
    protocol: Protocol = field(default_factory=Protocol)
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    n_devices: int = 1
    batch_size: int | None = None
    seed: int = 0
    max_prompts: int | None = None
    refusal_openings: tuple[str, ...] | None = None
    interventions: bool = True
    doses: bool = False
    n_resamples: int = 10_000
    confidence: float = 0.95
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self):
        if not isinstance(self.model, (str, Path)):
            name = type(self.model).__name__
            raise InputError(f"model is a {name}: give its name, or run_experiment(model=model)")
        object.__setattr__(self, "model", str(self.model))
        for name in ("controls", "refusal_openings"):
            if isinstance(single := getattr(self, name), (str, Contrast)):
                object.__setattr__(self, name, (single,))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        if self.max_prompts is not None and self.max_prompts < 1:
            raise InputError(f"max_prompts is {self.max_prompts}: at least one, or None for all")
        fewest = fewest_resamples(self.confidence)
        if self.n_resamples < fewest:
            need = f"{self.confidence:.0%} intervals need at least {fewest}"
            raise InputError(f"n_resamples is {self.n_resamples}: {need}")

    @classmethod
    def of(cls, given: Any = None, **options: Any) -> "Config":
        """A configuration from a model's name, a mapping or another one, with options replaced.

        >>> Config.of("organism:specific", against="alarm", position=-2).negativity
        'alarm'
        """
        if isinstance(given, cls):
            return replace(given, **options)
        if isinstance(given, Mapping):
            return cls(**{**given, **options})
        return cls(**options if given is None else {"model": given, **options})

    def contrasts(self) -> dict[str, Contrast]:
        """Return the contrasts of the run by part: `refusal`, `negativity`, then the controls.

        Raises InputError if a name is unknown or two contrasts share a prompt, and so its noise.
        """
        given = [as_contrast(item) for item in (self.refusal, self.negativity)]
        names = [contrast.name for contrast in given]
        loaded = [*given, *(as_contrast(each) for each in self.controls if each not in names)]
        if most := self.max_prompts:  # rounded down, which keeps the bundled sets balanced
            loaded = [some_prompts(contrast, most, down=True) for contrast in loaded]
        owner: dict[str, Contrast] = {}
        for contrast in loaded:
            for prompt in (*contrast.target, *contrast.baseline):
                if (first := owner.setdefault(prompt, contrast)) is not contrast:
                    raise InputError(
                        f"the contrasts {first.name!r} and {contrast.name!r} share the prompt "
                        f"{prompt[:60]!r}, and so noise that inflates the cosine: keep prompts disjoint"
                    )
        parts = ["refusal", "negativity", *(contrast.name for contrast in loaded[2:])]
        if len(set(parts)) < len(parts):
            raise InputError(f"the controls {parts[2:]} need names of their own, each only once")
        return dict(zip(parts, map(_clustered, loaded), strict=True))


def spread(prompts: Sequence[Any], at_most: int, *, down: bool = False) -> list[Any]:
    """Return `at_most` prompts, spread evenly from first to last; places are rounded."""
    n, last = min(at_most, len(prompts)), len(prompts) - 1
    places = [i * last / max(1, n - 1) for i in range(n)]
    return [prompts[int(place + 1e-9) if down else round(place)] for place in places]


def some_prompts(contrast: Contrast, at_most: int, **rounding: bool) -> Contrast:
    """Return the contrast with at most so many prompts a side, spread evenly, in whole pairs."""
    sides = contrast.target, contrast.baseline
    return contrast.subset(*(spread(range(len(side)), at_most, **rounding) for side in sides))


def _clustered(contrast: Contrast) -> Contrast:
    """The contrast with its near-duplicates in clusters, unless it says what its clusters are."""
    sides = [contrast.target, contrast.baseline]
    if contrast.paired:
        sides = [tuple(map(" ".join, zip(*sides, strict=True)))]
    labels = [
        near_duplicates([re.findall(r"\w+", text.casefold()) for text in side]) for side in sides
    ]
    alike = sum(len(side) - len({*side}) for side in labels)
    if contrast.clusters or not alike:
        return contrast
    counted = "they count as one cluster, which widens intervals; a column `cluster` says otherwise"
    logger.warning(f"{alike} prompts of {contrast.name!r} nearly repeat others: {counted}")
    clusters = [tuple(map(str, side)) for side in labels]
    return replace(contrast, clusters=clusters[0] if contrast.paired else tuple(clusters))


_init = lenient(Config).__init__


@wraps(_init)
def _init_with_words(self: Config, *args: Any, **given: Any) -> None:
    """`Config`'s own `__init__`, which takes the command line's words too."""
    for word in WORDS.keys() & given.keys():
        given[WORDS[word]] = given.pop(word)
    if names := {field.name for field in fields(Protocol)} & given.keys():
        own = {name: given.pop(name) for name in names}
        given["protocol"] = replace(given.get("protocol", Protocol()), **own)
    _init(self, *args, **given)


Config.__init__ = _init_with_words  # type: ignore[method-assign]
