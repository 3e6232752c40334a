"""The choices behind a run, as one frozen value."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..errors import InputError
from ..models.load import DEFAULT_MODEL
from ..prompts.contrast import Contrast, load_contrast
from ..prompts.protocol import Protocol
from ..uncertainty import fewest_resamples
from .verdict import Thresholds


@dataclass(frozen=True)
class Config:
    """Every choice of a run.

    Attributes:
        model: a hub name, a local directory, or `organism:` and `specific`, `entangled`, `oblivious`.
        layer: layer to highlight (`hook_resid_post`); None is 20 of 32, or the same relative depth.
        refusal, negativity: the contrasts to compare, bundled names or `Contrast`s.
        controls: further contrasts to compare with refusal.
        protocol: how a prompt becomes a vector; exactly one position.
        revision: branch, tag or commit on the hub.
        device, dtype: such as "cuda" and "bfloat16"; None is a GPU, if any, and bfloat16 on a GPU.
        n_devices: GPUs over which the model's layers are spread, beginning with `device`.
        batch_size: prompts in a forward pass; None derives the number from the free memory.
        seed: seed of everything random.
        max_prompts: most prompts of every set, spread from first to last; None uses all.
        refusal_openings: how a refusal's reply begins; None takes `reply_openings.REFUSAL`.
        interventions: ablate and add the directions; without, the verdict is inconclusive.
        n_resamples, confidence: resamples for intervals and nulls, and the intervals' confidence.
        thresholds: thresholds of the verdict.
    """

    model: str = DEFAULT_MODEL
    layer: int | None = None
    refusal: str | Contrast = "refusal"
    negativity: str | Contrast = "negativity"
    controls: tuple[str | Contrast, ...] = ("positivity", "alarm")
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
    n_resamples: int = 10_000
    confidence: float = 0.95
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self):
        if self.max_prompts is not None and self.max_prompts < 1:
            raise InputError(f"max_prompts is {self.max_prompts}: at least one, or None for all")
        fewest = fewest_resamples(self.confidence)
        if self.n_resamples < fewest:
            need = f"{self.confidence:.0%} intervals need at least {fewest}"
            raise InputError(f"n_resamples is {self.n_resamples}: {need}")

    def torch_dtype(self) -> torch.dtype | None:
        """Return torch's dtype of this name; raise InputError if it is not a floating-point dtype."""
        if self.dtype is None:
            return None
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise InputError(f"no dtype {self.dtype!r}: choose bfloat16, float16 or float32")
        return found

    def contrasts(self) -> dict[str, Contrast]:
        """Return the contrasts of the run by part: `refusal`, `negativity`, then the controls.

        Raises InputError if a name is unknown or two contrasts share a prompt, and so its noise.
        """
        given = (self.refusal, self.negativity, *self.controls)
        loaded = [load_contrast(item) if isinstance(item, str) else item for item in given]
        loaded = [self._subset(contrast) for contrast in loaded]
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
        return dict(zip(parts, loaded, strict=True))

    def _subset(self, contrast: Contrast) -> Contrast:
        """The contrast with at most `max_prompts` prompts a side, pairs kept together."""

        def some(side: tuple[str, ...]) -> Iterable[int]:
            most, last = self.max_prompts, len(side) - 1
            if most is None or most > last:
                return range(len(side))
            return (i * last // max(1, most - 1) for i in range(most))

        return contrast.subset(some(contrast.target), some(contrast.baseline))
