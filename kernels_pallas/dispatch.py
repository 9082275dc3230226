"""Which implementation of an op runs, and why the others did not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

NAMES = ("reference", "chunked", "mosaic_tpu", "mosaic_gpu")


class UnavailableError(ValueError):
    """A named implementation cannot run here; the message says why and what can."""


def resolve[F: Callable[..., object]](
    op: str, implementation: str | None, available: Mapping[str, F]
) -> F:
    """Returns the function to run for `op`.

    Args:
      op: Name of the op, for the message.
      implementation: One of `NAMES`, or None for the best one.
      available: The implementations that exist for this op, best first.

    Raises:
      UnavailableError: The name is unknown, or this op has no such implementation.
        Nothing is ever replaced silently.
    """
    if implementation is None:
        return next(iter(available.values()))
    if implementation in available:
        return available[implementation]
    known = ", ".join(available)
    if implementation in NAMES:
        raise UnavailableError(
            f"{op} has no {implementation!r} kernel in this release; available: {known}"
        )
    raise UnavailableError(f"{op}: unknown implementation {implementation!r}; available: {known}")
