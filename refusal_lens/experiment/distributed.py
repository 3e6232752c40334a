"""One run over several processes, as `torchrun` or `accelerate launch` starts them.

Every process runs the same program with the whole model in memory. `in_shares` and `divide` divide
independent work over the processes and return all results in every process, through CPU memory.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import TypeVar

import torch

from ..errors import InputError

PATIENCE = timedelta(hours=6)  # longer than any single task takes
ENDED = "a process of this run has ended: start the run again, it resumes from the cache"

Result = TypeVar("Result")

_in_task = False


def rank_and_count() -> tuple[int, int]:
    """Return this process's rank and the number of processes; 0 and 1 inside a task."""
    if _in_task:
        return 0, 1
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Return whether this is the main process, which prints and writes."""
    return rank_and_count()[0] == 0


def own_device(device: str | None, n_devices: int = 1) -> str | None:
    """Return the device of this process: `device`, or the first of `n_devices` GPUs of its own."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{int(local_rank) * n_devices}"
    return device


def in_shares(run: Callable[[slice], Result]) -> list[Result]:
    """Run `run(share)` in every process, and return the results of all, by rank, in each.

    Every process must call this function with the same work. `items[share]` is this process's share
    of any list: all items in a single process, every n-th item in one of n. Inside `run`, the
    process is alone. `run` returns what can be pickled. InputError if another process has ended.
    """
    global _in_task
    rank, count = rank_and_count()
    if count == 1:
        return [run(slice(None))]
    _in_task = True
    try:
        own = run(slice(rank, None, count))
    finally:
        _in_task = False
    return _gather(own)


def divide(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Divide tasks over the processes as `in_shares` does; return all results, in order, in each.

    The main process runs a single task.
    """
    shares = in_shares(lambda share: [task() for task in tasks[share]])
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(tasks))]


@contextmanager
def command() -> Iterator[None]:
    """Run a command in every process; the main process prints, and one process says why it ended."""
    rank, count = rank_and_count()
    if count == 1:
        yield
        return

    def stop(number: int, frame: object) -> None:
        sys.exit(f"refusal-lens: {ENDED}" if _is_first_to_end() else 128 + number)

    signal.signal(signal.SIGTERM, stop)
    _gather(rank)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            if rank:
                logging.getLogger("refusal_lens").setLevel(logging.ERROR)
            yield
    except InputError:
        if not _is_first_to_end():
            sys.exit(2)
        raise
    torch.distributed.destroy_process_group()


def _gather(value: Result) -> list[Result]:
    """Return the values of all processes, by rank."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    try:
        PartialState(cpu=True, timeout=PATIENCE)
        return list(gather_object([value]))
    except (RuntimeError, ValueError) as error:
        raise InputError(ENDED) from error


def _is_first_to_end() -> bool:
    """Return whether no other process has reported yet why the run ends."""
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("ended", 1) == 1
    except RuntimeError:  # the store was in the process that ended
        return True
