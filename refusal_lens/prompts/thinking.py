"""Thinking models, whose replies begin with a block of thought whatever is asked."""

import re

from jaxtyping import Float
from torch import Tensor


def with_closed_thinking(chat: str) -> str:
    """Return the chat with a closed, empty block of thought at its end, as Qwen3's template has it.

    Closes a `<think>` that the template has opened.
    """
    return re.sub(r"<think>\s*\Z", "", chat) + "<think>\n\n</think>\n\n"


def constant_first_token(logits: Float[Tensor, "prompt d_vocab"]) -> int | None:
    """Return the token that begins the reply to every prompt, or None if there is no such token.

    Where there is one, and it is no refusal token, the first token says nothing about refusal: a
    thinking model begins with `<think>` whatever is asked. `Protocol(thinking=False)` helps there.

    `logits` are next-token logits after each prompt; "begins" means a probability of 0.99 or more.
    """
    least = logits.float().softmax(-1).amin(0)
    token = int(least.argmax())
    return token if least[token] >= 0.99 else None
