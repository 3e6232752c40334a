"""What the published experiment's script did by mistake, kept to be compared with.

The one place that does it. A protocol gets here only if it says `allow_faults=True`, and every
function that reads activations for a result of its own refuses one that reads padding.

- `bos="twice"`: the chat template writes BOS, and tokenizing its text adds another.
- `padding="right_in_twos"`: prompts go through the model two at a time, in their order, the shorter
  one padded on the right, and positions count from the end of the padded row. So of every two
  prompts of unequal length, one is read at a padding token.
"""

from collections.abc import Sequence

from .template import Tokens

FAULTS = {
    ("bos", "twice"): "two BOS tokens",
    ("padding", "right_in_twos"): "right padding in batches of two, read at the last column",
}
"""What each faulty choice of a protocol's field is, in words."""


def with_second_bos(one: Tokens, bos: int) -> Tokens:
    """The tokens with another BOS in front."""
    return Tokens([bos, *one.ids], ["special", *one.roles])


def padding_behind(lengths: Sequence[int]) -> list[int]:
    """How many padding tokens come behind each prompt where two at a time are padded on the right.

    The last of an odd number of prompts is alone, so it gets none.
    """
    pairs = [lengths[i : i + 2] for i in range(0, len(lengths), 2)]
    return [max(pair) - length for pair in pairs for length in pair]
