"""One run over several processes, as `torchrun` or `accelerate launch` starts them.

Every process runs the same program with the whole model in memory. `divide` divides independent
tasks over the processes and returns all results in every process, through CPU memory.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch

from ..errors import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = timedelta(hours=6)  # longer than any single task takes

Result = TypeVar("Result")

_in_task = False


def own_device(device: str | None) -> str | None:
    """Return the device of this process: `device`, or a GPU of its own by default."""
    if device in (None, "cuda") and _launched() and torch.cuda.is_available():
        return f"cuda:{_join().local_process_index}"
    return device


def is_main() -> bool:
    """Return whether this is the main process, which prints and writes."""
    return _rank_and_count()[0] == 0


def shares(items: Sequence[Result]) -> list[list[Result]]:
    """Return one list of items for each process, dealt in turn."""
    _, count = _rank_and_count()
    return [[*items[rank::count]] for rank in range(count)]


def divide(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Divide independent tasks over the processes and return all results, in order, in each.

    Every process must call this function with the same tasks. The main process runs a single task.
    Inside a task, `divide` runs its tasks in the same process.

    Args:
        tasks: functions without arguments whose results can be pickled.

    Raises:
        InputError: in every process, if a task raises one or a process has ended.
    """
    global _in_task
    rank, count = _rank_and_count()
    if count == 1:
        return [task() for task in tasks]
    results: list[Result] = []
    mistake = ""
    _in_task = True
    try:
        results = [task() for task in tasks[rank::count]]
    except InputError as error:
        mistake = str(error)
    finally:
        _in_task = False
    everywhere = _gather((results, mistake))
    for _, mistake in everywhere:
        if mistake:
            raise InputError(mistake)
    return [everywhere[i % count][0][i // count] for i in range(len(tasks))]


@contextmanager
def command() -> Iterator[None]:
    """Run a command in every process. Only the main process prints; a stopped process says why."""
    if not _launched():
        yield
        return
    rank, count = _rank_and_count()

    def stop(number: int, frame: object) -> None:
        print(
            f"refusal-lens: process {rank} of {count} was stopped, because another process or the "
            "run ended; finished batches are in the cache, so start the run again",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    if rank == 0:
        yield
    else:
        logging.getLogger("refusal_lens").setLevel(logging.ERROR)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    _join().destroy_process_group()


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _rank_and_count() -> tuple[int, int]:
    """Return this process's rank and the number of processes; 0 and 1 inside a task."""
    if _in_task or not _launched():
        return 0, 1
    return _join().process_index, _join().num_processes


def _join() -> "PartialState":
    """Return the group of processes; the first call forms it."""
    from accelerate import PartialState

    try:
        return PartialState(cpu=True, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of this run did not find each other: {error}") from error


def _gather(value: Result) -> list[Result]:
    """Return the values of all processes, by rank."""
    from accelerate.utils import gather_object

    try:
        return list(gather_object([value]))
    except RuntimeError as error:
        raise InputError(
            f"process {_join().process_index} can't reach the others: one of them has ended "
            f"({str(error).strip().splitlines()[0][:120]}); finished batches are in the cache, so "
            "start the run again"
        ) from error
