"""M1's chat template, and the split between thinking and answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.tokenizer import BOS, EOS

THINK_START = "<think>\n"
THINK_END = "</think>"
_HEADERS = {
    "system": "system ai_setting=assistant",
    "user": "user name=user",
    "assistant": "ai name=assistant",
}


def render_chat(messages: Sequence[Mapping[str, Any]], *, reply: bool = True) -> str:
    """Messages as the models were trained to see them.

    Args:
      messages: Each with a "role" (system, user, assistant) and "content": a string, or a list
        of {"type": "text", "text": ...} items.
      reply: End with the header of the assistant's turn.

    Raises:
      ValueError: an unknown role or kind of content.

    Source: the chat template released with MiniMax-M1.
    """
    turns = [f"{BOS}{_header(m)}\n{_text(m)}{EOS}\n" for m in messages]
    return "".join(turns) + (f"{BOS}{_HEADERS['assistant']}\n" if reply else "")


def split_thinking(text: str) -> tuple[str | None, str]:
    """The visible thinking, None if it was not closed, and the answer after it."""
    thinking, closed, answer = text.partition(THINK_END)
    if not closed:
        return None, ""
    return thinking.removeprefix(THINK_START).strip(), answer.strip()


def _header(message: Mapping[str, Any]) -> str:
    role = message.get("role")
    if role not in _HEADERS:
        raise ValueError(f"unknown chat role {role!r}; known: {', '.join(_HEADERS)}")
    return _HEADERS[role]


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(_is_text(item) for item in content):
        return "".join(item["text"] for item in content)
    raise ValueError(f"chat content must be a string or a list of text items, got {content!r}")


def _is_text(item: Any) -> bool:
    return (
        isinstance(item, Mapping)
        and item.get("type") == "text"
        and isinstance(item.get("text"), str)
    )
