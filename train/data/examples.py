"""Rows to examples: token ids, and which of them are to be predicted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.chat import THINK_END, THINK_START, Turn, chat_turns, has_image, message_text
from mmjax.tokenizer import Tokenizer
from train.data.documents import Record

_NONE = np.zeros(0, np.int32)
# What messages of any other form than a chat's may raise.
NO_CHAT = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class Example(NamedTuple):
    """ids of one document, and 1 for each that is to be predicted.

    With pictures: `tiles` are numbers of their tiles, and `features` gives for each token the row
    of `Vision.features` of these tiles, -1 for a token of text. `undecodable`: of its bytes, some
    came as U+FFFD. `rejected`: of a pair, the answer that this one is preferred to.
    """

    # Arrays: a list takes ten times the memory, and Grain, which measures what passes through it,
    # goes through one number by number.
    ids: np.ndarray
    loss_mask: np.ndarray
    tiles: np.ndarray = _NONE
    features: np.ndarray = _NONE
    undecodable: bool = False
    rejected: Example | None = None

    @property
    def size(self) -> int:
        """Places that it takes in a row; two answers lie side by side in two rows."""
        return max(len(self.ids), len(self.rejected.ids) if self.rejected else 0)

    @classmethod
    def answering(cls, prompt: Sequence[int], answer: Sequence[int]) -> Example:
        """A prompt with its answer, which alone is to be predicted."""
        ids = np.array([*prompt, *answer], np.int32)
        return cls(ids, (np.arange(len(ids)) >= len(prompt)).astype(np.int8))


class Skipped(NamedTuple):
    """A row that makes no example: "malformed", "empty" or "too_long", and what to tell."""

    kind: str
    message: str


class TextEncoder:
    """Documents of a field, each closed by the end token; all of it is predicted.

    Args:
      tokenizer: Of the model.
      field: That holds the text.
    """

    def __init__(self, tokenizer: Tokenizer, field: str) -> None:
        self._tokenizer, self._field = tokenizer, field

    def __call__(self, record: Record) -> Example | Skipped:
        """The example, or why there is none."""
        wrong = _unusable(record) or self._wrong(record)
        if wrong is not None:
            return wrong
        ids = [*self._tokenizer.encode(record.row[self._field]), self._tokenizer.eos_id]
        mask = np.ones(len(ids), np.int8)
        return Example(np.asarray(ids, np.int32), mask, undecodable=record.undecodable)

    def _wrong(self, record: Record) -> Skipped | None:
        text = record.row.get(self._field)
        if not isinstance(text, str):
            told = f"{record.place}: {self._field!r} is {text!r:.80}, expected a string"
            return Skipped("malformed", told)
        if not text.strip():
            return Skipped("empty", f"{record.place} has no text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # "\\ud800" is JSON, but half a character
            return Skipped("malformed", f"{record.place}: {error}")
        return None


class ChatEncoder:
    """Chats in M1's template; what the assistant writes is predicted, its end token included.

    What stands before a turn of the assistant's is encoded apart from it, as a prompt is.

    Args:
      tokenizer: Of the model.
      field: That holds the messages; the row's "tools" are taken too.
      length: T, beyond which a chat is skipped: a part of it would be an answer without its
        question.
      thinking: "keep", or "drop" the assistant's.
    """

    def __init__(self, tokenizer: Tokenizer, field: str, length: int, thinking: str) -> None:
        self._tokenizer, self._field = tokenizer, field
        self._length, self._thinking = length, thinking

    def __call__(self, record: Record) -> Example | Skipped:
        """The example, or why there is none."""
        wrong = _unusable(record)
        if wrong is not None:
            return wrong
        try:
            messages = record.row.get(self._field)
            turns = self.turns(messages, self._field, offered_tools(record.row))
            example = self.example(turns)
        except NO_CHAT as error:
            return Skipped("malformed", f"{record.place}: {error}")
        wrong = self.refused(example, record.place)
        return wrong or example._replace(undecodable=record.undecodable)

    def turns(self, messages: Any, name: str, tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
        """Turns of a chat.

        Raises:
          ValueError: `messages`, the row's `name`, is no chat, or one with pictures, which nothing
            here would show to the model.
        """
        if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
            raise ValueError(f"{name!r} is {messages!r:.80}, expected a list of messages")
        if any(map(has_image, messages)):
            raise ValueError(f"{name!r} holds an image; data.source 'text' reads none")
        return list(chat_turns([self._shown(message) for message in messages], tools=tools))

    def example(self, turns: Sequence[Turn], context: int = 0) -> Example:
        """Tokens of turns, of which the first `context` are only read."""
        ids: list[int] = []
        mask: list[int] = []
        before = self._tokenizer.document_start

        def add(text: str, predicted: int) -> None:
            new = self._tokenizer.encode(text)
            ids.extend(new)
            mask.extend([predicted] * len(new))

        for number, turn in enumerate(turns):
            if not turn.stop:
                before += turn.text
                continue
            add(before + turn.text[: turn.start], 0)
            add(turn.text[turn.start : turn.stop], int(number >= context))
            before = turn.text[turn.stop :]
        return Example(np.asarray(ids, np.int32), np.asarray(mask, np.int8))

    def refused(self, example: Example, place: str) -> Skipped | None:
        """Why there is nothing to learn from an example."""
        if not any(example.loss_mask):
            return Skipped("empty", f"{place} has no turn of the assistant's")
        if len(example.ids) > self._length:
            told = f"{place} takes {len(example.ids)} tokens, data.sequence_length {self._length}"
            return Skipped("too_long", told)
        return None

    def _shown(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """An assistant's message with its thinking in the text, or without any."""
        if message.get("role") != "assistant":
            return message
        text = message_text(message) if message.get("content") is not None else ""
        thought = message.get("reasoning_content")
        if self._thinking == "drop":
            _, closed, after = text.partition(THINK_END)
            text = after.lstrip() if closed else text
        elif thought:
            text = f"{THINK_START}{thought.strip()}\n{THINK_END}\n\n{text}"
        calls = message.get("tool_calls")
        return dict(message) | {"content": text or (None if calls else ""), "tool_calls": calls}


class PairEncoder:
    """Two answers to the same question, the one that is preferred and the other.

    The turns with which both begin are the question; what the assistant writes after them is
    predicted.

    Args:
      chats: Encodes each of the two; a pair of which one is too long for a row is skipped.
    """

    def __init__(self, chats: ChatEncoder) -> None:
        self._chats = chats

    def __call__(self, record: Record) -> Example | Skipped:
        """The preferred answer with the other beside it, or why there is none."""
        wrong = _unusable(record)
        if wrong is not None:
            return wrong
        try:
            tools = offered_tools(record.row)
            turns = [
                self._chats.turns(whole_chat(record.row, name), name, tools)
                for name in ("chosen", "rejected")
            ]
            if turns[0] == turns[1]:
                return Skipped("empty", f"{record.place}: chosen and rejected are the same")
            alike = (a == b for a, b in zip(*turns, strict=False))
            context = sum(1 for _ in itertools.takewhile(bool, alike))
            chosen, rejected = (self._chats.example(each, context) for each in turns)
        except NO_CHAT as error:
            return Skipped("malformed", f"{record.place}: {error}")
        wrong = self._chats.refused(chosen, f"{record.place}: chosen")
        wrong = wrong or self._chats.refused(rejected, f"{record.place}: rejected")
        return wrong or chosen._replace(rejected=rejected, undecodable=record.undecodable)


def offered_tools(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The functions of a row's "tools": a list, or its JSON text; OpenAI's wrapper is taken off.

    Raises:
      ValueError: it is no list of objects.
    """
    given = row.get("tools") or []
    tools = (json.loads(given) or []) if isinstance(given, str) else given
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"'tools' is {given!r:.80}, expected a list of objects")
    return [tool["function"] if tool.get("type") == "function" else tool for tool in tools]


def whole_chat(row: Mapping[str, Any], name: str) -> Any:
    """The messages of one side of a pair: the prompt's, where there are any, before the answer's.

    Args:
      row: `chosen` and `rejected` are whole chats, or answers to `prompt`: text, or messages that
        begin with the assistant's. `prompt` is text or messages.
      name: "chosen" or "rejected".

    Raises:
      ValueError: an answer without a prompt.
    """
    prompt, answer = row.get("prompt"), row.get(name)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list) or not answer or answer[0]["role"] != "assistant":
        return answer
    if not prompt:
        raise ValueError(f"{name!r} is an answer, but there is no 'prompt'")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*before, *answer]


def _unusable(record: Record) -> Skipped | None:
    if not record.problem:
        return None
    if record.problem == "empty":
        return Skipped("empty", f"{record.place} is empty")
    return Skipped("malformed", f"{record.place} {record.problem}")
