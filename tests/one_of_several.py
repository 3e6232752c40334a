"""One process of several, as torchrun starts them: `one_of_several.py RANK HOW ARGUMENTS`.

Runs `refusal-lens` with the arguments. After its first batch the process of that rank, if there is
one, ends without a word, as a process does whose machine fails (`dies`), or raises (`errs`); or it
ends after its first candidates (`dies choosing`), its first model (`dies loading`) or its first
share of a sweep (`dies ablating`).
"""

import os
import sys

from refusal_lens.activations import extract as extraction
from refusal_lens.cli import main as cli
from refusal_lens.errors import InputError
from refusal_lens.experiment import cached_model, causal
from refusal_lens.interventions import selection

_, rank, how, *arguments = sys.argv


def failing(module, name):
    """Let the process of the rank fail where it calls a function for the second time."""
    function, calls = getattr(module, name), []

    def counted(*args, **options):
        calls.append(args)
        if len(calls) > 1 and os.environ.get("RANK") == rank:
            if how == "errs":
                raise InputError("this GPU is full")
            os._exit(17)
        return function(*args, **options)

    setattr(module, name, counted)


if how == "dies choosing":
    failing(selection, "ablation_effects")
elif how == "dies loading":
    failing(cached_model, "load_model")
elif how == "dies ablating":
    failing(causal, "ablation_effects")
else:
    failing(extraction, "_run_batch")
cli.main(arguments)
