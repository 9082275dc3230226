"""M1's chat template, and what a reply is made of: thinking, text, tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mmjax.tokenizer import BOS, EOS

THINK_START = "<think>\n"
THINK_END = "</think>"
# Stands for an image in a prompt of VL-01.
IMAGE = "<image>"
_HEADERS = {
    "system": "system ai_setting=assistant",
    "user": "user name=user",
    "assistant": "ai name=assistant",
    "tool": "tool name=tools",
}
_CALLS_START = "<tool_calls>"
_CALLS_END = "</tool_calls>"
_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}]')
_TOOLS_BEFORE = "You are provided with these tools:\n<tools>\n"
_TOOLS_AFTER = (
    "</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls> XML "
    "tags, and provide tool-name and json-object of arguments, following the format below:\n"
    '<tool_calls>\n{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n</tool_calls>'
)


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    reply: bool = True,
    document_start: str = "",
) -> str:
    """Messages as the models were trained to see them.

    As in the released template, all system messages come first, as one turn, and the tools after
    them. The template leaves two things to its caller: an assistant's "tool_calls" are written as
    the model itself writes them, and results that follow one another share one turn.

    Args:
      messages: Each with a "role" (system, user, assistant, tool) and "content": a string, or a
        list of {"type": "text", "text": ...} items and, for VL-01, {"type": "image"} or OpenAI's
        {"type": "image_url", ...}, which become IMAGE in their places. An assistant's may hold
        "tool_calls" in OpenAI's form, with or without content, their arguments as an object or as
        its JSON text; a tool's names its tool by "name", in the message or in the item, or by the
        "tool_call_id" of an earlier call.
      tools: {"name", "description", "parameters"} of each function that the model may call.
      reply: End with the header of the assistant's turn.
      document_start: What a prompt starts with: `Tokenizer.document_start`.

    Raises:
      ValueError: an unknown role or kind of content, tools or arguments that are no objects, or a
        result without its tool's name.

    Source: the chat template released with MiniMax-M1, and its function call guide.
    """
    turns = "".join(turn.text for turn in chat_turns(messages, tools=tools))
    return document_start + turns + (f"{BOS}{_HEADERS['assistant']}\n" if reply else "")


class Turn(NamedTuple):
    """A turn as it is written, and where in it what the assistant wrote begins and ends.

    Both are 0 in turns of others; the assistant's own part has the token that ends a turn.
    """

    text: str
    start: int = 0
    stop: int = 0


def chat_turns(
    messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = ()
) -> Iterator[Turn]:
    """The turns that `render_chat` joins, with the same arguments.

    Raises:
      ValueError: what `render_chat` raises.
    """
    system = "".join(message_text(m) for m in messages if _role(m) == "system")
    if system:
        yield _turn("system", system)
    if tools:
        if not all(isinstance(tool, Mapping) for tool in tools):
            raise ValueError(f"tools must be a list of objects, got {tools!r:.80}")
        described = "".join(f"{_json(tool)}\n" for tool in tools)
        yield Turn(
            f"{BOS}system tool_setting=tools\n{_TOOLS_BEFORE}{described}{_TOOLS_AFTER}{EOS}\n"
        )
    yield from _conversation([m for m in messages if _role(m) != "system"])


def message_text(message: Mapping[str, Any]) -> str:
    """A message's content as it is written, with IMAGE for its images.

    Raises:
      ValueError: the content is neither a string nor a list of text and image items.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(_item, content))
    what = "a string or a list of text and image items"
    raise ValueError(f"chat content must be {what}, got {content!r}")


def has_image(message: Mapping[str, Any]) -> bool:
    """Whether a message's content holds an image item."""
    content = message.get("content")
    return isinstance(content, list) and any(map(_is_image, content))


def thinks(text: str) -> bool:
    """Whether a text ends in a thinking part that is open."""
    return text.rfind(THINK_START.strip()) > text.rfind(THINK_END)


def split_thinking(text: str) -> tuple[str | None, str]:
    """The visible thinking, None if it was not closed, and the answer after it."""
    thinking, closed, answer = text.partition(THINK_END)
    if not closed:
        return None, ""
    return thinking.removeprefix(THINK_START).strip(), answer.strip()


def _conversation(messages: Sequence[Mapping[str, Any]]) -> Iterator[Turn]:
    names: dict[str, str] = {}  # of the tools called so far, by the call's id
    results = ""
    for message in messages:
        if message["role"] == "tool":
            results += _results(message, names)
            continue
        if results:
            yield _turn("tool", results)
            results = ""
        calls = message.get("tool_calls") or ()
        names |= {call["id"]: call["function"]["name"] for call in calls}
        text = message_text(message) if message.get("content") is not None or not calls else ""
        yield _turn(message["role"], text + _called(calls, text))
    if results:
        yield _turn("tool", results)


def _turn(role: str, text: str) -> Turn:
    header, body = f"{BOS}{_HEADERS[role]}\n", f"{text}{EOS}"
    own = (len(header), len(header + body)) if role == "assistant" else (0, 0)
    return Turn(f"{header}{body}\n", *own)


def _called(calls: Sequence[Mapping[str, Any]], text: str) -> str:
    """Calls in OpenAI's form as the model writes them."""
    if not calls:
        return ""
    lines = [
        f'{{"name": {_json(f["name"])}, "arguments": {_arguments(f["arguments"])}}}\n'
        for f in (call["function"] for call in calls)
    ]
    return f"{'\n' if text else ''}{_CALLS_START}\n{''.join(lines)}{_CALLS_END}"


def _arguments(value: Any) -> str:
    """The JSON text of an object; one that is a text already stays as it was written."""
    given = value
    if isinstance(value, str):
        try:
            given = json.loads(value, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a call's arguments are no JSON: {value!r:.80}: {error}") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"a call's arguments must be a JSON object, got {value!r:.80}")
    if isinstance(value, str):
        return value
    return json.dumps(dict(given), ensure_ascii=False, allow_nan=False)


def _results(message: Mapping[str, Any], names: Mapping[str, str]) -> str:
    content = message.get("content")
    items = content if isinstance(content, list) else [{"type": "text", "text": content}]
    call = message.get("tool_call_id")
    known = message.get("name") or names.get(str(call))
    text = ""
    for item in items:
        result = message_text({"content": [item]})
        name = item.get("name") or known
        if not name:
            raise ValueError(
                f"the tool of a result is unknown: tool_call_id {call!r} is no earlier call's; "
                'give the message a "name"'
            )
        text += f"tool name: {name}\ntool result: {result}\n\n"
    return text


def _role(message: Mapping[str, Any]) -> str:
    role = message.get("role")
    if role not in _HEADERS:
        raise ValueError(f"unknown chat role {role!r}; known: {', '.join(_HEADERS)}")
    return str(role)


def _item(item: Any) -> str:
    if _is_image(item):
        return IMAGE
    if _is_text(item):
        return str(item["text"])
    raise ValueError(f"chat content must be a list of text and image items, got {item!r}")


def _is_image(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("type") in ("image", "image_url")


def _is_text(item: Any) -> bool:
    return (
        isinstance(item, Mapping)
        and item.get("type") == "text"
        and isinstance(item.get("text"), str)
    )


def _json(value: Any) -> str:
    """JSON as the released template's `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)


class Piece(NamedTuple):
    """Part of a reply: some thinking, some text, or one whole tool call.

    text is, for a call, its arguments: a JSON object. name is the tool's, for a call only.
    """

    kind: Literal["thinking", "text", "tool_call"]
    text: str
    name: str = ""


class ReplyParser:
    """Takes a reply apart while it is being written.

    `<think>…</think>` at its start is thinking; each `{"name": …, "arguments": {…}}` between
    `<tool_calls>` and `</tool_calls>` is a call; everything else is text, and so is whatever
    between these marks is not a call. White space beside the marks is dropped. How the reply is
    cut into feeds does not change what all pieces of a kind add up to.

    Args:
      tools: Whether to look for calls; without, they are text.
    """

    def __init__(self, *, tools: bool) -> None:
        self._tools = tools
        self._buffer = ""
        self._state: Callable[[bool], Iterator[Piece]] = self._start
        self._skipped = ""  # the opening mark and space, which become text if no call follows
        self._scan = _ObjectEnd()

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text settles."""
        self._buffer += text
        return list(self._settle(False))

    def finish(self) -> list[Piece]:
        """The pieces that were held back for text that did not come."""
        return list(self._settle(True))

    def _settle(self, last: bool) -> Iterator[Piece]:
        state = None
        while state != self._state:
            state = self._state
            yield from state(last)

    def _take(self, count: int) -> str:
        if not count:
            return ""
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _start(self, last: bool) -> Iterator[Piece]:
        mark, text = THINK_START.strip(), self._buffer.lstrip()
        if text.startswith(mark):
            self._buffer = text.removeprefix(mark)
            self._state = self._before_thinking
        elif last or not mark.startswith(text):
            self._state = self._text
        yield from ()

    def _before_thinking(self, last: bool) -> Iterator[Piece]:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._state = self._thinking
        yield from ()

    def _thinking(self, last: bool) -> Iterator[Piece]:
        before, found, after = self._buffer.partition(THINK_END)
        if found:
            if before.strip():
                yield Piece("thinking", before.rstrip())
            self._buffer, self._state = after, self._after_mark
        elif ready := self._take(_settled(before, THINK_END, last)):
            yield Piece("thinking", ready)

    def _after_mark(self, last: bool) -> Iterator[Piece]:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._state = self._text
        yield from ()

    def _text(self, last: bool) -> Iterator[Piece]:
        if not self._tools:
            last, before, found = True, self._buffer, ""
        else:
            before, found, _ = self._buffer.partition(_CALLS_START)
        if found:
            if before.strip():
                yield Piece("text", before.rstrip())
            self._take(len(before) + len(found))
            self._skipped = before[len(before.rstrip()) :] + found
            self._state, self._scan = self._calls, _ObjectEnd()
        elif ready := self._take(_settled(before, _CALLS_START, last)):
            yield Piece("text", ready)

    def _calls(self, last: bool) -> Iterator[Piece]:
        """Calls between the marks; at the first thing that is none, the rest is text."""
        while not self._calls_end():
            text = self._buffer
            end = self._scan.find(text) if text.startswith("{") else 0
            call = _parse_call(text[:end]) if end else None
            if call is not None:
                yield call
                self._take(end)
                self._skipped, self._scan = "", _ObjectEnd()
                continue
            if not last and not end and (text.startswith("{") or _CALLS_END.startswith(text)):
                return  # it may still become a call, or the end
            if (self._skipped + text).strip():
                yield Piece("text", self._skipped + self._take(1))
            self._state = self._text
            return

    def _calls_end(self) -> bool:
        """Goes past the closing mark, if it is next and follows at least one call."""
        text = self._buffer.lstrip()
        self._skipped += self._take(len(self._buffer) - len(text))
        if self._skipped.strip() or not text.startswith(_CALLS_END):
            return False
        self._buffer, self._state = text.removeprefix(_CALLS_END), self._after_mark
        return True


class _ObjectEnd:
    """Finds the brace that closes a JSON object, reading each character of it once."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._quoted = False

    def find(self, text: str) -> int:
        """The place after that brace; 0 if it is yet to come. Text may only have grown."""
        while found := (_IN_STRING if self._quoted else _OUTSIDE).search(text, self._at):
            mark = found.group()
            if mark == "\\" and found.end() == len(text):
                break  # what is escaped is yet to come
            self._at = found.end() + (mark == "\\")
            if mark == '"':
                self._quoted = not self._quoted
            elif mark != "\\":
                self._depth += 1 if mark == "{" else -1
                if self._depth == 0:
                    return self._at
        else:
            self._at = len(text)
        return 0


def _settled(text: str, mark: str, last: bool) -> int:
    """How many characters cannot belong to a mark that is being written, nor to space before it."""
    if last:
        return len(text)
    begun = next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
    return len(text[: len(text) - begun].rstrip())


def _parse_call(text: str) -> Piece | None:
    """A call in the model's form; None if it is not one."""
    try:
        call = json.loads(text, parse_constant=_refuse)
        # Numbers too large for a float are read as infinity, which JSON does not know.
        arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False, allow_nan=False)
        arguments.encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    known = set(call) <= {"name", "arguments"} and isinstance(name, str) and name.isprintable()
    return Piece("tool_call", arguments, name) if known and name and arguments[0] == "{" else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
