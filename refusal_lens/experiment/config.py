"""What decides a run, as one frozen value."""

from dataclasses import dataclass, field, replace

import torch

from ..errors import InputError
from ..models.load import DEFAULT_MODEL
from ..prompts.contrast import Contrast, load_contrast
from ..prompts.protocol import Protocol
from ..uncertainty import fewest_resamples
from .verdict import Thresholds


@dataclass(frozen=True)
class Config:
    """Everything that decides a run.

    Attributes:
        model: `organism:specific`, `organism:entangled`, `organism:oblivious`, a hub name or a
            local directory.
        layer: the layer to highlight, counted as `blocks.{layer}.hook_resid_post`. None is layer 20
            of Llama-3's 32, and the same relative depth in a model of another depth.
        refusal: the contrast whose direction is in question: a bundled name or a `Contrast`.
        negativity: the contrast it may turn out to be.
        controls: further contrasts, compared with refusal in the same way.
        protocol: how a prompt becomes a vector; exactly one position.
        revision: the hub's branch, tag or commit.
        device: "cuda", "cpu", ...; None takes the GPU where there is one.
        dtype: "bfloat16", "float32", ...; None is bfloat16 on a GPU.
        batch_size: prompts a forward pass; None finds it from free memory.
        seed: of everything random.
        max_prompts: use only so many prompts of every set, evenly from first to last; None uses
            all. For a quick look.
        interventions: ablate and add the directions too; without them there is no verdict but
            inconclusive.
        n_resamples: resamples behind intervals and nulls.
        confidence: of every interval.
        thresholds: what the verdict compares its numbers with.
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
    batch_size: int | None = None
    seed: int = 0
    max_prompts: int | None = None
    interventions: bool = True
    n_resamples: int = 10_000
    confidence: float = 0.95
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self):
        if self.max_prompts is not None and self.max_prompts < 1:
            raise InputError(
                f"max_prompts is {self.max_prompts}: use at least one, or None for all"
            )
        fewest = fewest_resamples(self.confidence)
        if self.n_resamples < fewest:
            raise InputError(
                f"n_resamples is {self.n_resamples}: intervals at {self.confidence:.0%} need at "
                f"least {fewest}"
            )

    def torch_dtype(self) -> torch.dtype | None:
        """The dtype by its name in torch.

        Raises:
            InputError: if torch has no floating-point dtype of that name.
        """
        if self.dtype is None:
            return None
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise InputError(f"no dtype {self.dtype!r}: choose bfloat16, float16 or float32")
        return found

    def contrasts(self) -> dict[str, Contrast]:
        """Every contrast of the run by the part it plays: `refusal`, `negativity`, then controls.

        Raises:
            InputError: on an unknown name, or where two contrasts share prompts (their sampling
                noise would be shared too, and the cosine inflated).
        """
        loaded = [
            self._cut(load_contrast(item) if isinstance(item, str) else item)
            for item in (self.refusal, self.negativity, *self.controls)
        ]
        owner: dict[str, int] = {}
        for i, contrast in enumerate(loaded):
            for prompt in (*contrast.target, *contrast.baseline):
                if (first := owner.setdefault(prompt, i)) != i:
                    raise InputError(
                        f"the contrasts {loaded[first].name!r} and {contrast.name!r} share the "
                        f"prompt {prompt[:60]!r}: their noise would be shared and the cosine "
                        "inflated; keep their prompts disjoint"
                    )
        parts = ["refusal", "negativity", *(contrast.name for contrast in loaded[2:])]
        if len(set(parts)) < len(parts):
            raise InputError(f"the controls {parts[2:]} need names of their own, each only once")
        return dict(zip(parts, loaded, strict=True))

    def _cut(self, contrast: Contrast) -> Contrast:
        """The contrast with at most `max_prompts` prompts a side, pairs kept together."""

        def some(rows: tuple[str, ...]) -> tuple[str, ...]:
            n, most = len(rows), self.max_prompts
            if most is None or n <= most:
                return rows
            return tuple(rows[i * (n - 1) // max(1, most - 1)] for i in range(most))

        return replace(
            contrast,
            target=some(contrast.target),
            baseline=some(contrast.baseline),
            topics=some(contrast.topics),
        )
