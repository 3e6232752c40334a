"""One run over several processes, as `accelerate launch` or `torchrun` starts them.

Every process runs the same program with the whole model in it. What a model has to do is divided
over them by whole batches, those that one process alone would make, so that the numbers are the
same bits whatever the number of processes. Then everybody is given everything.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others before it takes them for lost."""
AT_ONCE = 2**26
"""Numbers that are exchanged at a time: 256 MB in float32."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Team:
    """The processes of a run, and which of them this one is: by default the only one.

    Attributes:
        rank: this process's number; 0 is the one that prints and writes.
        count: how many there are.
        local_rank: its number among those on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[Value]) -> list[Value]:
        """This process's part of what all of them have to do, in turns."""
        return [*items[self.rank :: self.count]]

    def gather(self, value: Value) -> list[Value]:
        """Everybody's value, by rank, for everybody.

        Raises:
            InputError: if another process has ended, or can't be reached for too long.
        """
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        with self._exchange():
            return list(gather_object([value]))

    def add_up(self, rows: Tensor) -> Tensor:
        """The sum of everybody's tensor, exact where all but one of them hold zeros.

        Raises:
            InputError: as `gather`.
        """
        if self.count == 1:
            return rows
        from accelerate import PartialState
        from accelerate.utils import reduce

        at_once = max(1, AT_ONCE // max(1, rows[:1].numel()))
        parts: list[Tensor] = []
        with self._exchange():
            for part in rows.split(at_once):
                whole: Any = reduce(part.to(PartialState().device), reduction="sum")
                parts.append(whole.cpu())
        return torch.cat(parts)

    def once(self, compute: Callable[[], Value]) -> Value:
        """What the leading process computes, for everybody; its InputError too.

        Raises:
            InputError: as `gather`.
        """
        return self.agreed(compute if self.leads else None)[0]

    def agreed(self, compute: Callable[[], Value] | None) -> list[Any]:
        """Everybody's answer, by rank, `None` of those that compute nothing.

        Raises:
            InputError: the first of anybody's, and as `gather`.
        """
        answer, mistake = None, None
        try:
            answer = compute() if compute else None
        except InputError as error:
            if self.count == 1:
                raise
            mistake = str(error)
        answers = self.gather((answer, mistake))
        for _, wrong in answers:
            if wrong is not None:
                raise InputError(wrong)
        return [given for given, _ in answers]

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise InputError(
                f"process {self.rank} of {self.count} can't reach the others: one of them has "
                f"ended ({str(error).strip().splitlines()[0][:120]}); what was finished is in the "
                "cache, so start the run again"
            ) from error


ALONE = Team()


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def join(device: str | None = None) -> Team:
    """Meet the other processes of this run, where there are any; `device` is the one asked for.

    Raises:
        InputError: if the run was launched and `accelerate` is missing or can't join.
    """
    if not launched():
        return ALONE
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InputError(
            "a run over several processes needs accelerate: pip install accelerate"
        ) from error
    on_cpu = not torch.cuda.is_available() or (device or "").startswith("cpu")
    try:
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"this run's processes did not find each other: {str(error).strip().splitlines()[0]}"
        ) from error
    return Team(state.process_index, state.num_processes, state.local_process_index)


def speak_as(team: Team) -> None:
    """For a program of its own: one process is heard, and one that is told to stop says why."""
    if not team.leads:
        logging.getLogger("refusal_lens").setLevel(logging.ERROR)

    def stop(number: int, frame: object) -> None:
        print(
            f"refusal-lens: process {team.rank} of {team.count} was told to stop, because another "
            "one ended or the run was ended; what was finished is in the cache, so start it again",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def leave() -> None:
    """End the meeting, so that no process waits for another any more."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
