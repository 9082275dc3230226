"""Sampling that goes on while batches are trained on: no staler than allowed, nothing lost.

Groups are trained on in the order in which they were asked for. Asking for one stops when it could
be reached only after more batches than the staleness allows; that alone bounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from train.config import JobConfig
from train.rollout import Asked, Group, Sampler, pack_group, unpack_group


class Pipeline:
    """Groups on their way from the curriculum to a batch.

    Args:
      sampler: Where they are sampled.
      cfg: Of the job.
      draw: Gives the next group to sample.
      finish: Scores finished groups and takes notice of them.
    """

    def __init__(
        self,
        sampler: Sampler,
        cfg: JobConfig,
        draw: Callable[[], Asked],
        finish: Callable[[list[Group]], list[Group]],
    ) -> None:
        self._sampler, self._draw, self._score = sampler, draw, finish
        self._size = cfg.cispo.prompts_per_batch
        self._staleness = cfg.asynchronous.max_staleness
        self._drops = (cfg.sampling.rounds - 1) * self._size
        # In the order of asking.
        self._queue: dict[int, Asked | Group] = {}
        self._dropped = 0

    def batch(self, trained: int, poll: Callable[[], None]) -> list[Group]:
        """Samples until the next batch is there.

        Args:
          trained: Batches given so far, the one that is being trained on included.
          poll: Called between bursts; gives the sampler new weights when there are some.
        """
        while True:
            self._ask(trained)
            if (ready := self._ready()) is not None:
                self._dropped = 0
                return ready
            for group in self._score(self._sampler.step()):
                self._take(group)
            poll()

    def _ask(self, trained: int) -> None:
        behind = trained - self._sampler.version
        while len(self._queue) < (1 + self._staleness - behind) * self._size:
            asked = self._draw()
            self._queue[asked.number] = asked
            self._sampler.add(asked)

    def _take(self, group: Group) -> None:
        if not group.has_signal and self._dropped < self._drops:
            self._dropped += 1
            del self._queue[group.number]
        else:
            self._queue[group.number] = group

    def _ready(self) -> list[Group] | None:
        first = list(self._queue)[: self._size]
        groups = [group for n in first if isinstance(group := self._queue[n], Group)]
        if len(groups) < self._size:
            return None
        for number in first:
            del self._queue[number]
        return groups

    def get_state(self) -> dict[str, Any]:
        """What was asked for and not yet given, as JSON: finished groups whole, others anew."""
        queue = [
            pack_group(x) if isinstance(x, Group) else [x.number, x.problem, x.params.max_tokens]
            for x in self._queue.values()
        ]
        return {"queue": queue, "dropped": self._dropped}

    def set_state(self, state: Mapping[str, Any], ask: Callable[[int, int, int], Asked]) -> None:
        """Back to a place; `ask` makes of a number, a problem and a limit what is sampled."""
        self._dropped = state["dropped"]
        for entry in state["queue"]:
            x = unpack_group(entry) if isinstance(entry, str) else ask(*entry)
            self._queue[x.number] = x
            if isinstance(x, Asked):
                self._sampler.add(x)
