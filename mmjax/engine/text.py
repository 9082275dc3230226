"""Tokens to text as they come: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mmjax.tokenizer import Tokenizer

# What decoders put in place of bytes that are no character, or not yet one.
_BROKEN = "\ufffd"
# Most of them that a character's first bytes are decoded to.
_UNFINISHED = 3
# Earlier tokens that are decoded along: some tokenizers' spaces depend on the token before. Most of
# them while the end is unfinished, and how many stay of those then.
_CONTEXT, _WINDOW, _LATEST = 4, 64, 16


class TextStream:
    """The text of one sample.

    Args:
      tokenizer: What decodes it; None makes no text.
      stop: Texts that end the sample.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._window: list[int] = []
        self._decoded = 0  # characters of the window's text that are done with
        self._held = ""  # text that may yet become a stop string

    def push(self, ids: Sequence[int]) -> tuple[str, int | None]:
        """Takes in tokens.

        Returns:
          Text that can be shown; and the number of tokens up to the one that completed a stop
          string, None if none did.
        """
        if not self._stop:
            return self._decode(ids, final=False), None
        shown = ""
        for count, token in enumerate(ids, 1):
            text, stopped = self._cut(self._decode([token], final=False))
            shown += text
            if stopped:
                return shown, count
        return shown, None

    def finish(self) -> str:
        """The text that is still held back, when no more will come."""
        text, stopped = self._cut(self._decode([], final=True))
        return text if stopped else text + self._held

    def _decode(self, ids: Sequence[int], *, final: bool) -> str:
        if self._tokenizer is None:
            return ""
        self._window += ids
        text = self._tokenizer.decode(self._window)
        broken = 0 if final else len(text) - len(text.rstrip(_BROKEN))
        unfinished = min(broken, _UNFINISHED)
        whole = text[: len(text) - unfinished]
        new = whole[self._decoded :]
        self._decoded = max(self._decoded, len(whole))
        if not unfinished or len(self._window) > _WINDOW:
            self._window = self._window[-(_LATEST if unfinished else _CONTEXT) :]
            self._decoded = len(self._tokenizer.decode(self._window)) - unfinished
        return new

    def _cut(self, new: str) -> tuple[str, bool]:
        """Text up to a stop string or to what may become one, and whether there is one."""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
