"""A progress bar for each function on its own, or one for a whole run, which names its steps."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tqdm.auto import tqdm


class RunBar(tqdm):
    """One bar for a whole run; `steps` are the names in order, and how often each runs a prompt."""

    def __init__(self, steps: Mapping[str, int], *, shown: bool):
        self.steps = dict(steps)
        counted = "{l_bar}{bar}| {n_fmt}/{total_fmt} prompt runs [{elapsed}<{remaining}]"
        super().__init__(total=sum(steps.values()), disable=not shown, bar_format=counted)

    def begin(self, step: str) -> None:
        """Begin a step; the steps before it are done, also where their results were stored."""
        self.set_description(step, refresh=False)
        self.update(sum([*self.steps.values()][: [*self.steps].index(step)]) - self.n)
        self.refresh()


def bar_of(progress: bool | RunBar, **options: Any) -> AbstractContextManager[tqdm]:
    """Return a new bar to count on, or the bar of the whole run, which its owner closes."""
    if isinstance(progress, RunBar):
        return nullcontext(progress)
    return tqdm(disable=not progress, **options)
