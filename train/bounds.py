"""What the numbers of a config may be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An interval, and how a message says it.

    Attributes:
      said: What a number "must be".
      low, high: Its ends; a number that is not finite is outside.
      low_in, high_in: Whether the ends belong to it.
    """

    said: str
    low: float = -math.inf
    high: float = math.inf
    low_in: bool = True
    high_in: bool = True

    def hold(self, x: float) -> bool:
        """Whether a number is inside."""
        above = x >= self.low if self.low_in else x > self.low
        below = x <= self.high if self.high_in else x < self.high
        return math.isfinite(x) and above and below


POSITIVE = Bounds("positive", 0, low_in=False)
NOT_NEGATIVE = Bounds("0 or above", 0)
SHARE = Bounds("in [0, 1]", 0, 1)
BELOW_ONE = Bounds("in [0, 1)", 0, 1, high_in=False)
SEED = Bounds("in [0, 2**31)", 0, 2**31, high_in=False)


def outside(prefix: str, section: Any, bounds: Mapping[Bounds, str]) -> list[str]:
    """A message for each key of a section that is not within its bounds.

    Args:
      prefix: Of the section's keys, "cispo." or "".
      section: A dataclass; where a key is None it is not looked at.
      bounds: The keys that they are for, as one text.
    """
    values = [(key, getattr(section, key), b) for b, keys in bounds.items() for key in keys.split()]
    return [
        f"{prefix}{key} must be {b.said}, got {value}"
        for key, value, b in values
        if value is not None and not b.hold(value)
    ]
