"""What went wrong with a checkpoint, all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_SHOWN = 20


class CheckpointWarning(UserWarning):
    """Something about a checkpoint that its user ought to know, though it can be used."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked; the message names file and tensor.

    Attributes:
      problems: Every problem that was found; the message shows the first 20.
    """

    def __init__(self, where: Path | str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = [f"\n  {problem}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            shown.append(f"\n  ... and {len(self.problems) - _SHOWN} more")
        plural = "s" * (len(self.problems) > 1)
        super().__init__(f"{where}: {len(self.problems)} problem{plural}{''.join(shown)}")
