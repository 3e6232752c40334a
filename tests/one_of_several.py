"""One process of several, as torchrun starts them: `one_of_several.py RANK HOW ARGUMENTS`.

Runs `refusal-lens` with the arguments. After its first batch the process of that rank, if there is
one, ends without a word, as a process does whose machine fails (`dies`), or raises (`errs`).
"""

import os
import sys

from refusal_lens.activations import extract as extraction
from refusal_lens.cli import main as cli
from refusal_lens.errors import InputError

run_batch, n_batches = extraction._run_batch, 0
_, rank, how, *arguments = sys.argv


def counted(*batch, **options):
    global n_batches
    n_batches += 1
    if n_batches > 1 and os.environ.get("RANK") == rank:
        if how == "dies":
            os._exit(17)
        raise InputError("this GPU is full")
    return run_batch(*batch, **options)


extraction._run_batch = counted
cli.main(arguments)
