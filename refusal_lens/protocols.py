"""Named protocols: ours, the published experiment's with its faults, Arditi et al.'s.

DEFAULT    no system prompt, generation prompt, last token, one BOS, `resid_post`
PUBLISHED  what the published 0.1031 came from, faults included
ARDITI     no system prompt, generation prompt, the five tokens of Llama-3's template that follow
           the instruction, `resid_pre`; `arditi(tokenizer)` counts another template's
"""

from typing import TYPE_CHECKING

from .chat import Protocol, show_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT = Protocol()
"""What every function reads unless told otherwise."""

ASSUMED_SYSTEM_PROMPT = "You are a helpful assistant."
"""Stands in for the published experiment's system prompt: that it had one is known, its text is not."""

PUBLISHED_PROMPTS = 5
"""Prompts in each of the published experiment's four sets."""

PUBLISHED = Protocol(
    name="published (faulty)",
    system_prompt=ASSUMED_SYSTEM_PROMPT,
    generation_prompt=False,
    positions=(-1,),
    hook="resid_pre",
    bos="twice",
    padding="right_in_twos",
    allow_faults=True,
)
"""The published experiment's, faults and all; the system prompt's text is an assumption.

The template's text was tokenised as if it had no BOS yet, so there are two. Two prompts at a time
were padded on the right and read at the last column, so the shorter of each two is read at a padding
token. Without the generation prompt the last token is the one that ends the prompt's turn. And
`hidden_states[20]` is the *input* of block 20, our layer 19.
"""

ARDITI = Protocol(
    name="Arditi et al.",
    system_prompt=None,
    generation_prompt=True,
    positions=(-5, -4, -3, -2, -1),
    hook="resid_pre",
)
"""Arditi et al.'s for Llama-3 and for other templates with five tokens after the instruction.

Reference: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
"""

NAMED = {"default": DEFAULT, "published": PUBLISHED, "arditi": ARDITI}


def arditi(tokenizer: "PreTrainedTokenizerBase") -> Protocol:
    """Arditi et al.'s protocol for a tokenizer's own chat template.

    Its positions are all tokens that the template writes after the instruction.

    Raises:
        InputError: if the tokenizer has no chat template.
    """
    roles = [row.role for row in show_tokens(tokenizer, "How", protocol=DEFAULT)]
    n_after = roles[::-1].index("prompt")
    return Protocol(name=ARDITI.name, positions=tuple(range(-max(n_after, 1), 0)), hook=ARDITI.hook)
