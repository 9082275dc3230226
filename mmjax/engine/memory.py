"""Where samples keep what they remember: state slots, KV pages, kept prefixes, the host."""

from __future__ import annotations

import jax
import numpy as np

from mmjax.config import ModelConfig
from mmjax.engine import programs
from mmjax.engine.pages import Pages, Prefix, PrefixCache
from mmjax.engine.programs import FORKS, MOVED_PAGES, Moved, Pools
from mmjax.engine.sample import Sample


class Memory:
    """The pools of an engine and who holds what of them.

    State slots: first those of running samples, then those of kept prefixes, last one of zeros,
    with which fresh samples begin.

    Args:
      cfg: The model's configuration.
      slots: Samples that run at a time.
      pages: KV pages.
      page_size: Tokens of a page.
      table_width: Most pages of a sample.
      prefixes: Prefixes kept at most.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        slots: int,
        pages: int,
        page_size: int,
        table_width: int,
        prefixes: int,
    ) -> None:
        self.page_size = page_size
        self.pools = Pools.create(cfg, pages, page_size, slots + prefixes + 1)
        self.pages = Pages(pages)
        self.prefixes = PrefixCache(self.pages, range(slots, slots + prefixes))
        self.keeps_prefixes = prefixes > 0
        self.table = np.zeros((slots, table_width), np.int32)
        self._free_slots = list(range(slots - 1, -1, -1))
        self._zeros = slots + prefixes
        self._forks: list[tuple[tuple[int, int], tuple[int, int]]] = []

    @property
    def total(self) -> int:
        """Pages there are."""
        return len(self.pages.holders)

    @property
    def free_slots(self) -> int:
        """Samples that can still be admitted."""
        return len(self._free_slots)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def cached_pages(self) -> int:
        """Pages that kept prefixes alone hold."""
        holding: dict[int, int] = {}
        for page in self.prefixes.all_pages():
            holding[page] = holding.get(page, 0) + 1
        return sum(int(self.pages.holders[page]) == count for page, count in holding.items())

    def admit(self, sample: Sample, prefix: Prefix | None, tokens: int) -> bool:
        """Gives a sample a slot, and pages for so many tokens; False, and nothing, if it cannot.

        What the slot and a shared last page begin with is there after `fork`.
        """
        shared = prefix.pages[: prefix.length // self.page_size] if prefix else []
        # Held, so that making room cannot take them.
        held = prefix.pages if prefix else []
        self.pages.share(held)
        count = max(self.pages_for(tokens) - len(shared), 0)
        if not self.free_slots or not self._make_room(count):
            self.pages.release(held)
            return False
        sample.slot = self._free_slots.pop()
        sample.pages = shared + self.pages.take(count)
        sample.computed = prefix.length if prefix else 0
        self._list_pages(sample)
        partial = held[len(shared) :]
        page = (partial[0], sample.pages[len(shared)]) if partial else (0, 0)
        self._forks.append(((prefix.slot if prefix else self._zeros, sample.slot), page))
        self.pages.release(partial)
        return True

    def grow(self, sample: Sample, tokens: int) -> bool:
        """Sees to pages for so many tokens; False, and none, if there are not as many."""
        count = self.pages_for(tokens) - len(sample.pages)
        if count <= 0:
            return True
        if not self._make_room(count):
            return False
        sample.pages += self.pages.take(count)
        self._list_pages(sample)
        return True

    def release(self, sample: Sample) -> None:
        """Takes back what the sample holds, if anything."""
        if sample.slot is not None:
            self._free_slots.append(sample.slot)
        self.pages.release(sample.pages)
        sample.slot, sample.pages, sample.moved = None, [], None

    def keep_prefix(self, sample: Sample, digest: bytes) -> None:
        """Keeps what the sample has computed so far for others that begin alike; to be followed by
        `fork` before the sample goes on.
        """
        if not self.keeps_prefixes or digest in self.prefixes:
            return
        pages = sample.pages[: self.pages_for(sample.computed)]
        slot = self.prefixes.add(digest, sample.computed, pages)
        assert slot is not None
        assert sample.slot is not None
        self._forks.append(((sample.slot, slot), (0, 0)))

    def move_out(self, sample: Sample) -> None:
        """Brings a sample to the host, bit for bit."""
        used = sample.pages[: self.pages_for(sample.computed)]
        assert sample.slot is not None
        slot = np.int32(sample.slot)
        parts = [
            jax.device_get(programs.extract(self.pools, slot, pages))
            for pages in _in_parts(used, fill=0)
        ]
        self.release(sample)
        sample.moved = parts

    def move_in(self, sample: Sample, tokens: int) -> bool:
        """Brings a sample back, with pages for so many tokens; False, and nothing, if it cannot."""
        count = self.pages_for(tokens)
        if not self.free_slots or not self._make_room(count):
            return False
        parts: list[Moved] = sample.moved
        sample.slot, sample.pages, sample.moved = (
            self._free_slots.pop(),
            self.pages.take(count),
            None,
        )
        self._list_pages(sample)
        used = sample.pages[: self.pages_for(sample.computed)]
        for pages, part in zip(_in_parts(used, fill=self.total), parts, strict=True):
            self.pools = programs.insert(self.pools, np.int32(sample.slot), pages, part)
        return True

    def warm_up(self) -> None:
        """Compiles what moves rows, without moving any."""
        self._run_fork([((self._zeros, self._zeros), (0, 0))])
        nothing = np.full(MOVED_PAGES, self.total, np.int32)
        moved = jax.device_get(
            programs.extract(self.pools, np.int32(self._zeros), np.zeros_like(nothing))
        )
        self.pools = programs.insert(self.pools, np.int32(self._zeros), nothing, moved)

    def fork(self) -> None:
        """Copies what admitted samples begin with, and what is kept of others, in their order."""
        for start in range(0, len(self._forks), FORKS):
            self._run_fork(self._forks[start : start + FORKS])
        self._forks = []

    def _run_fork(self, forks: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
        copies = np.zeros((FORKS, 2, 2), np.int32)
        copies[: len(forks)] = forks
        self.pools = programs.fork(self.pools, copies, np.int32(len(forks)))

    def _make_room(self, count: int) -> bool:
        while self.pages.free < count:
            if not self.prefixes.evict():
                return False
        return True

    def _list_pages(self, sample: Sample) -> None:
        self.table[sample.slot, : len(sample.pages)] = sample.pages


def _in_parts(pages: list[int], fill: int) -> list[np.ndarray]:
    """Page numbers in arrays of MOVED_PAGES, at least one, the last one filled up."""
    parts = [pages[i : i + MOVED_PAGES] for i in range(0, max(len(pages), 1), MOVED_PAGES)]
    return [np.array(p + [fill] * (MOVED_PAGES - len(p)), np.int32) for p in parts]
