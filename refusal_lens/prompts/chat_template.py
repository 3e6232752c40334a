"""Prompts in a chat template: the text of each chat, cut into pieces of known role."""

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .protocol import Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_TEMPLATES = Path(__file__).with_name("templates")
# As Llama-3-Instruct's tokenizer has it.
LLAMA3_CHAT_TEMPLATE = (_TEMPLATES / "llama3.jinja").read_text("utf-8").rstrip()
# In front of a template that reads the clock. Jinja drops the newlines after its statements.
FIXED_CLOCK = (_TEMPLATES / "fixed_clock.jinja").read_text("utf-8")

_PLACEHOLDERS = {"system": "sys3e7c1f90a2d4b586", "prompt": "usr8b41d65c7f0e92a3"}

Content = Callable[[str], Any]  # from a message's text to its content: text, or a list of parts


def format_prompts(
    tokenizer: "Tokenizer", prompts: Sequence[str], protocol: Protocol
) -> tuple[list[str], list[list[str]]]:
    """Return each prompt's chat as the tokenizer's `apply_chat_template` writes it, in pieces.

    All chats are cut into the same pieces, whose roles (template, system, prompt) come first.
    InputError if the template is missing, refuses a text, or does not write each exactly once.
    """
    render = _renderer(tokenizer, protocol)
    system = {} if protocol.system_prompt is None else {"system": protocol.system_prompt}
    placed = {role: _PLACEHOLDERS[role] for role in (*system, "prompt")}
    frame, content = _frame(render, placed)
    role_of = dict(zip(placed.values(), placed, strict=True))
    roles = [role_of.get(piece, "template") for piece in frame]
    if system:
        [text] = render([placed | system], content)
        frame = _filled(frame, roles.index("system"), text, "the system prompt")
    texts = render([system | {"prompt": prompt} for prompt in prompts], content)
    at = roles.index("prompt")
    return roles, [_filled(frame, at, text, f"prompts[{i}]") for i, text in enumerate(texts)]


def _template(tokenizer: "Tokenizer", asked: str | None) -> str:
    """The Jinja text of a template: `asked` itself, or the tokenizer's of this name or `default`."""
    own: Any = getattr(tokenizer, "chat_template", None) or {}
    named: dict[str, str] = own if isinstance(own, dict) else {"default": own}
    asked = "default" if asked is None else asked
    if asked in named or "{" in asked:
        return named.get(asked, asked)
    if asked == "plain":
        # A model that was trained with BOS in front of a text has it in front of a chat as well.
        begins = tokenizer("").input_ids[:1]
        plain = (_TEMPLATES / "plain.jinja").read_text("utf-8").rstrip()
        return "{{ bos_token }}" * (begins == [tokenizer.bos_token_id]) + plain
    but = f" named {asked!r}, but {', '.join(map(repr, sorted(named)))}" if named else ""
    problem = f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template{but}"
    advice = "as Protocol(chat_template=...), or --chat-template FILE; 'plain' is one for any model"
    raise InputError(f"{problem}: give one (Jinja, or a name) {advice}")


def _renderer(tokenizer: "Tokenizer", protocol: Protocol) -> Callable[..., list[str]]:
    """Return a function from the texts of each chat by role, and the form of contents, to chats."""
    from jinja2 import TemplateError

    template = _template(tokenizer, protocol.chat_template)
    now = datetime.fromisoformat(protocol.date)
    options: dict[str, Any] = {"chat_template": template, "date_string": now.strftime("%d %b %Y")}
    options |= {"add_generation_prompt": protocol.generation_prompt, "tokenize": False}
    if "strftime_now" in template:
        codes = re.findall(r"(?<!\{)%-?[A-Za-z]", template)
        options["clock"] = {code: now.strftime(code) for code in codes}
        options["chat_template"] = FIXED_CLOCK + template
    closes = protocol.generation_prompt and not protocol.thinking
    if not protocol.thinking and "enable_thinking" in template:
        options["enable_thinking"], closes = False, False
    names = {"system": "system", "prompt": "user"}

    def render(chats: list[dict[str, str]], content: Content) -> list[str]:
        messages: Any = [
            [{"role": names[role], "content": content(text)} for role, text in chat.items()]
            for chat in chats
        ]
        try:
            texts: Any = tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            what = " with a system prompt (some models take none)" if "system" in chats[0] else ""
            raise InputError(f"the chat template fails{what}: {error}") from error
        if not closes:
            return texts
        closed = "<think>\n\n</think>\n\n"  # as Qwen3's template has it; another may open the block
        return [re.sub(r"(<think>\s*)?\Z", closed, text, count=1) for text in texts]

    return render


def _frame(render: Callable[..., list[str]], placed: dict[str, str]) -> tuple[list[str], Content]:
    """The chat of placeholders cut around them, and the form of contents that the template reads."""
    problems: list[InputError] = []
    forms: list[Content] = [str, lambda text: [{"type": "text", "text": text}]]
    for content in forms:
        try:
            [text] = render([placed], content)
        except InputError as error:
            problems.append(error)
            continue
        frame = re.split(f"({'|'.join(placed.values())})", text)
        counts = {role: frame.count(placeholder) for role, placeholder in placed.items()}
        wrong = next((role for role, count in counts.items() if count != 1), None)
        # A template that takes text alone writes a list of parts as Python spells it.
        if wrong is None and "{'type'" not in "".join(frame):
            return frame, content
        which, times = "the system" if wrong == "system" else "a", counts[wrong or "prompt"]
        problem = f"the chat template writes {which} prompt {times} times: it should do so once"
        problems.append(InputError(problem))
    raise problems[0]


def _filled(frame: list[str], at: int, text: str, what: str) -> list[str]:
    """Replace the frame's piece `at` with the text that the template wrote there."""
    before, after = "".join(frame[:at]), "".join(frame[at + 1 :])
    written = text.removeprefix(before).removesuffix(after)
    if before + written + after != text:
        raise InputError(f"the chat template writes other text around {what} than around others")
    return [*frame[:at], written, *frame[at + 1 :]]
