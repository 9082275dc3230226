"""KV pages shared by reference count, and the prefixes that are worth keeping."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class Pages:
    """Numbers of KV pages, each with the count of those who hold it.

    Args:
      count: Pages there are.
    """

    def __init__(self, count: int) -> None:
        self.holders = np.zeros(count, np.int64)
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """New pages, held once; the caller has seen that there are as many."""
        taken = [self._free.pop() for _ in range(count)]
        self.holders[taken] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Holds pages once more."""
        self.holders[list(pages)] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Lets pages go."""
        pages = list(pages)
        self.holders[pages] -= 1
        self._free += [page for page in pages if not self.holders[page]]


@dataclasses.dataclass
class Prefix:
    """Tokens whose keys and values lie in `pages` and whose lightning state in `slot`."""

    length: int
    pages: list[int]
    slot: int


class PrefixCache:
    """Prefixes by a digest of their tokens, the least lately used evicted first.

    Args:
      pages: Where their pages are counted.
      slots: State slots that they may fill.
    """

    def __init__(self, pages: Pages, slots: Iterable[int]) -> None:
        self._pages = pages
        self._slots = list(slots)
        self._entries: OrderedDict[bytes, Prefix] = OrderedDict()

    def all_pages(self) -> Iterator[int]:
        """The pages of every prefix, as often as prefixes hold them."""
        for prefix in self._entries.values():
            yield from prefix.pages

    def get(self, digest: bytes) -> Prefix | None:
        """The prefix, which becomes the last to be evicted."""
        found = self._entries.get(digest)
        if found is not None:
            self._entries.move_to_end(digest)
        return found

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._entries

    def add(self, digest: bytes, length: int, pages: Sequence[int]) -> int | None:
        """A state slot for a new prefix on these pages; None if there is no room for any."""
        if not self._slots and not self.evict():
            return None
        slot = self._slots.pop()
        self._pages.share(pages)
        self._entries[digest] = Prefix(length, list(pages), slot)
        return slot

    def evict(self) -> bool:
        """Drops the least lately used prefix; False if there is none."""
        if not self._entries:
            return False
        _, prefix = self._entries.popitem(last=False)
        self._pages.release(prefix.pages)
        self._slots.append(prefix.slot)
        return True

    def clear(self) -> None:
        """Drops every prefix."""
        while self.evict():
            pass


def digests(
    tokens: Sequence[int] | np.ndarray,
    ends: Sequence[int],
    marks: Sequence[tuple[int, bytes]] = (),
) -> list[bytes]:
    """A digest of the tokens up to each of `ends`, which ascend.

    Args:
      tokens: Token ids.
      ends: Places.
      marks: What else is known of the token at a place, ascending: an image's digest at its first
        token, since all images have the same tokens.
    """
    raw = np.asarray(tokens, np.int32)
    running, start, found = hashlib.blake2b(digest_size=16), 0, []
    left = list(marks)
    for end in ends:
        while left and left[0][0] < end:
            place, mark = left.pop(0)
            running.update(raw[start:place].tobytes() + mark)
            start = place
        running.update(raw[start:end].tobytes())
        found.append(running.digest())
        start = end
    return found
