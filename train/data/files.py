"""Problems from JSONL files."""

from __future__ import annotations

import abc
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from mmjax.config import ConfigError
from train.data.sources import Problem, Source

# One row in so many is kept for evaluation, by its question alone, so that a longer file keeps
# the same ones.
_HELD_OUT = 10


class FileSource(Source):
    """A row a line, each an object with the fields of its class; others are kept in the entry.

    Args:
      task: As the config names it.
      path: Of the file.

    Raises:
      ConfigError: no such file, or a line that is no such object.
    """

    fields: ClassVar[tuple[str, ...]]

    def __init__(self, task: str, path: str) -> None:
        super().__init__(task)
        if not Path(path).is_file():
            raise ConfigError(f"task {task!r}: file {path} does not exist")
        with open(path, encoding="utf-8") as file:
            numbered = enumerate(file, 1)
            self._rows = [self._read(line, f"{path}:{n}") for n, line in numbered if line.strip()]
        if not self._rows:
            raise ConfigError(f"task {task!r}: file {path} has no rows")

    def draw(self, size: int, seed: int, *, held_out: bool) -> Iterator[Problem]:
        """Rows in a random order, each once."""
        rows = [r for r in self._rows if _kept(r["question"]) == held_out]
        for row in random.Random(seed).sample(rows, min(size, len(rows))):
            answer = row.get("answer", "")
            yield Problem(self.task, self.question(row), answer, row)

    @abc.abstractmethod
    def question(self, row: dict[str, Any]) -> str:
        """What the model is asked."""

    def invalid(self, row: Mapping[str, Any]) -> str:
        """What is wrong with a row, if anything."""
        missing = [name for name in self.fields if not isinstance(row.get(name), str)]
        return f"needs the text {', '.join(missing)}" if missing else ""

    def _read(self, line: str, place: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{place} is no JSON: {error}") from None
        complaint = self.invalid(row) if isinstance(row, dict) else "is no object"
        if complaint:
            raise ConfigError(f"{place} {complaint}")
        return dict(row)


def _kept(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % _HELD_OUT == 0
