"""Which prompts come next, and how long their completions may be: by what has been learned so far.

Everything here follows from the job's seed, what was drawn and what came of it, and is in
`get_state`: a resumed job draws the prompts that a straight one would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.cispo_config import CurriculumConfig, SamplingConfig

# Share of a task whose pass rate is 0 or 1 beside one at 1/2: so that a change is noticed.
_LEAST = 0.05


class PassRates:
    """How often each prompt passed, and each task lately.

    Args:
      memory: Share of a task's rate that stays after a batch.
    """

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self.prompts: dict[int, tuple[float, int]] = {}
        self.tasks: dict[str, float] = {}

    def record(self, index: int, passed: Sequence[float] | np.ndarray) -> None:
        """Counts the samples of a prompt, each 0 to 1."""
        before, tries = self.prompts.get(index, (0.0, 0))
        self.prompts[index] = (before + float(np.sum(passed)), tries + len(passed))

    def record_tasks(self, rates: Mapping[str, float]) -> None:
        """Moves the running rate of each task towards that of a batch."""
        for task, rate in rates.items():
            old = self.tasks.get(task, rate)
            self.tasks[task] = self._memory * old + (1 - self._memory) * rate

    def of(self, index: int) -> tuple[float, int]:
        """A prompt's pass rate and its samples so far."""
        passed, tries = self.prompts.get(index, (0.0, 0))
        return passed / max(tries, 1), tries


class Curriculum:
    """Endless prompts: tasks by their pass rate, within a task each prompt once an epoch.

    Args:
      tasks: The task of each problem.
      families: "rule" or "general", by task.
      cfg: Which tasks.
      sampling: For the retirement of prompts.
      seed: Of the job.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        families: Mapping[str, str],
        cfg: CurriculumConfig,
        sampling: SamplingConfig,
        seed: int,
    ) -> None:
        self._cfg, self._sampling, self._seed = cfg, sampling, seed
        self._members = {
            name: np.flatnonzero(np.array(tasks) == name) for name in sorted(set(tasks))
        }
        self._families = {name: families.get(name, "rule") for name in self._members}
        self.rates = PassRates(cfg.memory)
        self._drawn = 0
        self._places = dict.fromkeys(self._members, 0)
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def draw(self, count: int, batch: int) -> list[int]:
        """Indices of the next prompts.

        Args:
          count: How many.
          batch: Number of the batch that they are for, from 0.
        """
        random = np.random.default_rng([self._seed, self._drawn])
        self._drawn += 1
        names = list(self._members)
        chosen = random.choice(len(names), count, p=self._shares(batch))
        return [self._next(names[i]) for i in chosen]

    def _shares(self, batch: int) -> np.ndarray:
        """The probability of each task."""
        weights = np.array([self._weight(name) for name in self._members])
        general = np.array([self._families[name] == "general" for name in self._members])
        if general.all() or not general.any():
            return np.asarray(weights / weights.sum())
        cfg = self._cfg
        ramp = (batch + 1 - cfg.general_from) / max(cfg.general_full - cfg.general_from, 1)
        share = cfg.general_share * min(max(ramp, 0.0), 1.0)
        parts = ((general, share), (~general, 1 - share))
        return np.sum([of * weights * part / weights[of].sum() for of, part in parts], axis=0)

    def _weight(self, name: str) -> float:
        if not self._cfg.adaptive:
            return 1.0
        rate = self.rates.tasks.get(name, 0.5)
        return rate * (1 - rate) + _LEAST * 0.25

    def _next(self, name: str) -> int:
        """The next prompt of a task that is not retired; any if all are."""
        members = self._members[name]
        for _ in range(len(members)):
            epoch, place = divmod(self._places[name], len(members))
            self._places[name] += 1
            index = int(self._order(name, epoch)[place])
            if not self._retired(index):
                return index
        return index

    def _order(self, name: str, epoch: int) -> np.ndarray:
        """A task's prompts as they come in an epoch."""
        if name not in self._orders or self._orders[name][0] != epoch:
            random = np.random.default_rng([self._seed, epoch, len(self._members[name])])
            self._orders[name] = epoch, random.permutation(self._members[name])
        return self._orders[name][1]

    def _retired(self, index: int) -> bool:
        rate, tries = self.rates.of(index)
        return tries >= self._sampling.retire_after and rate >= self._sampling.retire_pass_rate

    @property
    def retired(self) -> int:
        """Prompts that are not drawn any more."""
        return sum(self._retired(index) for index in self.rates.prompts)

    def get_state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "drawn": self._drawn,
            "places": dict(self._places),
            "prompts": {str(i): list(x) for i, x in self.rates.prompts.items()},
            "tasks": dict(self.rates.tasks),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Back to a place."""
        self._drawn, self._places = state["drawn"], dict(state["places"])
        self.rates.prompts = {int(i): (x[0], x[1]) for i, x in state["prompts"].items()}
        self.rates.tasks = dict(state["tasks"])


class Windows:
    """The longest completion, in stages.

    A stage ends when completions fill it and the sampler's perplexity has settled.

    Args:
      cfg: The stages and what ends one.
      limit: The last of them.

    Source: MiniMax-M1 report, section 4.2.
    """

    def __init__(self, cfg: SamplingConfig, limit: int) -> None:
        self._cfg = cfg
        self._stages = cfg.windows or (limit,)
        self.stage = 0
        self._perplexities: list[float] = []

    @property
    def limit(self) -> int:
        """Longest completion of the stage, tokens."""
        return self._stages[self.stage]

    def record(self, lengths: np.ndarray, entropy: float) -> bool:
        """Takes in a batch's lengths and the sampler's mean -log π; whether a new stage begins."""
        steps = self._cfg.window_steps
        self._perplexities = [*self._perplexities, float(np.exp(entropy))][-2 * steps :]
        full = np.percentile(lengths, 99) >= self._cfg.window_share * self.limit
        if self.stage + 1 == len(self._stages) or not full or not self._settled():
            return False
        self.stage += 1
        self._perplexities = []
        return True

    def _settled(self) -> bool:
        steps, values = self._cfg.window_steps, self._perplexities
        if len(values) < 2 * steps:
            return False
        before, now = np.mean(values[:steps]), np.mean(values[steps:])
        return bool(abs(now - before) < self._cfg.window_tolerance * before)

    def get_state(self) -> dict[str, Any]:
        """As JSON."""
        return {"stage": self.stage, "perplexities": list(self._perplexities)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Back to a place."""
        self.stage, self._perplexities = state["stage"], list(state["perplexities"])
