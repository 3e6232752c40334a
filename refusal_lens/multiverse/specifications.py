"""The specifications to compare: a protocol and a subset of the prompts of two contrasts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch

from ..errors import InputError
from ..prompts import protocol as protocols
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol

STEPS: dict[str, dict[str, Any]] = {  # cumulative changes from the published protocol
    "every prompt": {},
    "no padding is read": {"padding": "left"},
    "BOS as the template has it": {"bos": "once"},
    "generation prompt": {"generation_prompt": True},
    "no system prompt": {"system_prompt": None},
}
SINGLE: dict[str, dict[str, Any]] = {  # single changes to the default protocol
    "padding is read": {"padding": "right_in_twos", "allow_bugs": True},
    "a BOS in front of the template's own": {"bos": "twice", "allow_bugs": True},
    "no generation prompt": {"generation_prompt": False},
    "a system prompt": {"system_prompt": protocols.ASSUMED_SYSTEM_PROMPT},
    "layers counted at the input": {"hook": "resid_pre"},
    "read at the prompt's own last token": {"positions": (protocols.LAST_PROMPT_TOKEN,)},
}


class Family(StrEnum):
    """The families of specifications."""

    PUBLISHED_TO_DEFAULT = "from published to default"
    ONE_CHOICE = "one choice changed"
    ARDITI = "Arditi et al."
    SUBSET = "subset"


@dataclass(frozen=True)
class Specification:
    """A protocol and its prompts: `rows` of the target and baseline of refusal and of negativity."""

    name: str
    family: Family
    protocol: Protocol
    rows: tuple[tuple[int, ...], ...]

    @property
    def n_prompts(self) -> int:
        """Prompts in the smallest of the four sets."""
        return min(map(len, self.rows))

    @property
    def is_default(self) -> bool:
        """Whether this is the default protocol with every prompt."""
        return self.protocol == protocols.DEFAULT and self.family is not Family.SUBSET

    def choices(self) -> dict[str, str]:
        """Return every choice in words; all specifications have the same keys."""
        p = self.protocol
        return {
            "padding": "none is read" if p.padding == "left" else "right, read at the last column",
            "BOS": "the template's" if p.bos == "once" else "one more",
            "generation prompt": "yes" if p.generation_prompt else "no",
            "system prompt": "no" if p.system_prompt is None else "yes",
            "layer": "output of block" if p.hook == "resid_post" else "input of block",
            "position": str(p.positions[0]).replace("_", " "),
            "prompts a set": str(self.n_prompts),
        }


def specify(
    contrasts: tuple[Contrast, Contrast], *, sizes: Sequence[int], draws: int, seed: int
) -> list[Specification]:
    """Return every specification; the options are those of `run_sensitivity`."""
    sides = [side for contrast in contrasts for side in (contrast.target, contrast.baseline)]
    if min(map(len, sides)) < 2:
        raise InputError("a set has a single prompt: subsets need at least two")
    every = tuple(tuple(range(len(side))) for side in sides)
    first = tuple(rows[: protocols.PUBLISHED_PROMPTS] for rows in every)
    family, protocol = Family.PUBLISHED_TO_DEFAULT, protocols.PUBLISHED
    name = f"published, {protocols.PUBLISHED_PROMPTS} prompts a set"
    found = [Specification(name, family, protocol, first)]
    for name, choice in STEPS.items():
        protocol = replace(protocol, **choice, name=f"published, {name}")
        found.append(Specification(f"+ {name}", family, protocol, every))
    found.append(Specification("default", family, protocols.DEFAULT, every))
    for name, choice in SINGLE.items():
        protocol = replace(protocols.DEFAULT, **choice, name=f"default, {name}")
        found.append(Specification(name, Family.ONE_CHOICE, protocol, every))
    for position in protocols.ARDITI.positions:
        protocol = replace(protocols.ARDITI, positions=(position,))
        found.append(Specification(f"position {position}", Family.ARDITI, protocol, every))
    generator = torch.Generator().manual_seed(seed)
    for size in sorted({size for size in sizes if 1 < size < min(map(len, every))}):
        for draw in range(1, draws + 1):
            rows: list[tuple[int, ...]] = []
            for each in contrasts:
                target = _drawn(len(each.target), size, generator)
                baseline = None if each.paired else _drawn(len(each.baseline), size, generator)
                rows += [target, baseline or target]
            name = f"{size} prompts, draw {draw}"
            found.append(Specification(name, Family.SUBSET, protocols.DEFAULT, tuple(rows)))
    return found


def _drawn(n: int, size: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(sorted(torch.randperm(n, generator=generator)[:size].tolist()))
