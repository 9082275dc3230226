"""Outputs of the engine as OpenAI's answers, in chunks or whole.

A whole answer is made by adding up the chunks that a stream would have sent, so both agree.
"""

from __future__ import annotations

import codecs
import uuid
from collections.abc import Iterable
from typing import Any, NotRequired, TypedDict

from mmjax.chat import Piece, ReplyParser
from mmjax.engine.results import Output, TokenLogprob
from mmjax.tokenizer import Tokenizer


class Choice(TypedDict):
    """One sample, or what a chunk adds to it: "text", or "delta", or "message".

    stop_reason says more than OpenAI's finish_reason can: "repetition".
    """

    index: int
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: NotRequired[str | None]
    text: NotRequired[str]
    delta: NotRequired[dict[str, Any]]
    message: NotRequired[dict[str, Any]]


class CachedTokens(TypedDict):
    """Prompt tokens that were found in the prefix cache."""

    cached_tokens: int


class Usage(TypedDict):
    """Counts of tokens, over all samples; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Answer(TypedDict):
    """A whole answer, or one chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: NotRequired[Usage | None]


class TextChoice:
    """One sample of /v1/completions."""

    def __init__(self, index: int, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self.index = index
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._pending: list[TokenLogprob] = []  # of tokens whose text is still held back
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def start(self) -> list[Choice]:
        """What a stream opens with: nothing."""
        return []

    def feed(self, output: Output) -> list[Choice]:
        """The chunks that an output makes."""
        self._pending += output.logprobs or []
        if not output.text and output.finish_reason is None:
            return []
        chunk = _choice(self.index, self._take_logprobs() if self._logprobs else None)
        chunk["text"] = output.text
        return [_ended(chunk, output)]

    def whole(self, chunks: Iterable[Choice]) -> Choice:
        """The sample, from all its chunks."""
        chunks = list(chunks)
        return {**chunks[-1], "text": _joined(chunks, "text"), "logprobs": _merged(chunks)}

    def _take_logprobs(self) -> dict[str, Any]:
        taken, self._pending = self._pending, []
        offsets = []
        for token in taken:
            offsets.append(self._offset)
            # A character of several tokens begins with the first of them.
            self._offset += len(self._characters.decode(self._tokenizer.token_bytes(token.token)))
        return {
            "tokens": [self._name(token.token) for token in taken],
            "token_logprobs": [finite(token.logprob) for token in taken],
            "top_logprobs": [
                {
                    self._name(t): finite(logprob)
                    for t, logprob in [*token.top, (token.token, token.logprob)]
                }
                for token in taken
            ],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        return token_name(self._tokenizer.token_bytes(token))


class ChatChoice:
    """One sample of /v1/chat/completions."""

    def __init__(self, index: int, tokenizer: Tokenizer, *, logprobs: bool, tools: bool) -> None:
        self.index = index
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._pending: list[TokenLogprob] = []  # of tokens whose text is still held back
        self._parser = ReplyParser(tools=tools)
        self._calls = 0

    def start(self) -> list[Choice]:
        """What a stream opens with: whose message it is."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def feed(self, output: Output) -> list[Choice]:
        """The chunks that an output makes."""
        self._pending += output.logprobs or []
        pieces = self._parser.feed(output.text)
        if output.finish_reason is None:
            return [self._chunk(self._delta(piece)) for piece in pieces]
        pieces += self._parser.finish()
        chunks = [self._chunk(self._delta(piece)) for piece in pieces]
        end = _ended(self._chunk({}), output)
        if end["finish_reason"] == "stop" and self._calls:
            end["finish_reason"] = "tool_calls"
        return [*chunks, end]

    def whole(self, chunks: Iterable[Choice]) -> Choice:
        """The sample, from all its chunks."""
        chunks = list(chunks)
        deltas = [chunk["delta"] for chunk in chunks]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        text = _joined(deltas, "content")
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if any("reasoning_content" in delta for delta in deltas):
            message["reasoning_content"] = _joined(deltas, "reasoning_content")
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {key: call[key] for key in call if key != "index"} for call in calls
            ]
        whole: Choice = {**chunks[-1], "message": message, "logprobs": _merged(chunks)}
        del whole["delta"]
        return whole

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if piece.kind == "thinking":
            return {"reasoning_content": piece.text}
        if piece.kind == "text":
            return {"content": piece.text}
        call = {
            "index": self._calls,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.text},
        }
        self._calls += 1
        return {"tool_calls": [call]}

    def _chunk(self, delta: dict[str, Any]) -> Choice:
        taken, self._pending = self._pending, []
        logprobs = None
        if self._logprobs and (taken or not delta):
            logprobs = {"content": [self._logprob(token) for token in taken], "refusal": None}
        chunk = _choice(self.index, logprobs)
        chunk["delta"] = delta
        return chunk

    def _logprob(self, token: TokenLogprob) -> dict[str, Any]:
        top = [self._entry(other, logprob) for other, logprob in token.top]
        return self._entry(token.token, token.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {"token": token_name(data), "logprob": finite(logprob), "bytes": list(data)}


class Count:
    """Tokens of one HTTP request, from its outputs."""

    def __init__(self) -> None:
        self._prompts: dict[str, tuple[int, int]] = {}
        self._completion = 0

    def add(self, output: Output) -> None:
        """Counts an output."""
        _, cached = self._prompts.get(output.request_id, (0, 0))
        prompt = (output.prompt_tokens, max(cached, output.cached_tokens))
        self._prompts[output.request_id] = prompt
        self._completion += len(output.token_ids)

    def usage(self) -> Usage:
        """The counts so far."""
        prompt = sum(tokens for tokens, _ in self._prompts.values())
        cached = sum(tokens for _, tokens in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion,
            "total_tokens": prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def token_name(data: bytes) -> str:
    r"""A token's text; what is not whole characters is written as OpenAI does, bytes:\xe2."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """The log-probability, or OpenAI's -9999 for an impossible token: JSON knows no infinity."""
    return max(-9999.0, logprob)


def _choice(index: int, logprobs: dict[str, Any] | None) -> Choice:
    return {"index": index, "logprobs": logprobs, "finish_reason": None}


def _ended(chunk: Choice, output: Output) -> Choice:
    """Says why it ended, in OpenAI's words: what was cut off ended by its length."""
    reason = output.finish_reason
    chunk["finish_reason"] = reason if reason in (None, "stop", "length") else "length"
    if reason != chunk["finish_reason"]:
        chunk["stop_reason"] = reason
    return chunk


def _joined(parts: Iterable[Any], key: str) -> str:
    return "".join(part.get(key) or "" for part in parts)


def _merged(chunks: list[Choice]) -> dict[str, Any] | None:
    """Log-probabilities of all chunks, list by list."""
    found = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    if not found:
        return None
    return {
        key: None if value is None else [entry for part in found for entry in part[key]]
        for key, value in found[0].items()
    }
