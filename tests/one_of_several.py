"""One process of a run, started as torchrun or accelerate start it: `one_of_several.py DIES ARGUMENTS`.

Runs `refusal-lens` with the arguments. Process DIES, if there is one of that rank, ends without a
word after its first batch, as one does whose machine goes.
"""

import os
import sys

from refusal_lens.activations import batching as reading
from refusal_lens.cli import main as cli

forward, n_batches = reading._forward, 0


def counted(*arguments):
    global n_batches
    n_batches += 1
    if n_batches > 1 and os.environ.get("RANK") == sys.argv[1]:
        os._exit(17)
    return forward(*arguments)


reading._forward = counted
cli.main(sys.argv[2:])
