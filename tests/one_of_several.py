"""One process of several, as torchrun starts them: `one_of_several.py RANK ARGUMENTS`.

Runs `refusal-lens` with the arguments. The process of that rank, if there is one, ends without a
word after its first batch, as a process does whose machine fails.
"""

import os
import sys

from refusal_lens.activations import extract as extraction
from refusal_lens.cli import main as cli

run_batch, n_batches = extraction._run_batch, 0


def counted(*arguments, **options):
    global n_batches
    n_batches += 1
    if n_batches > 1 and os.environ.get("RANK") == sys.argv[1]:
        os._exit(17)
    return run_batch(*arguments, **options)


extraction._run_batch = counted
cli.main(sys.argv[2:])
