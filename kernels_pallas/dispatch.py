"""Which implementation of an op runs, and why the others did not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

NAMES = ("reference", "chunked", "mosaic_tpu", "mosaic_gpu")


class UnavailableError(ValueError):
    """A named implementation cannot run here; the message says why and what can."""


class Target(NamedTuple):
    """The device that a computation is for.

    platform: "cpu", "gpu", "tpu", …; kind: as the device calls itself; cores: multiprocessors of
    a GPU, else 1; spread: the arrays may lie on several devices, as XLA sees fit.
    """

    platform: str
    kind: str
    cores: int
    spread: bool = False

    def why_not_tpu(self) -> str | None:
        """Why Mosaic TPU kernels cannot run on it; None where they can."""
        if self.platform != "tpu":
            return f"it needs a TPU; the arrays are on {self}"
        return self._why_not_spread()

    def why_not_hopper(self) -> str | None:
        """Why kernels for Hopper cannot run on it; None where they can."""
        hopper = self.platform == "gpu" and any(
            name in self.kind for name in ("H100", "H200", "H800", "H20", "GH200")
        )
        return (
            self._why_not_spread() if hopper else f"it needs a Hopper GPU; the arrays are on {self}"
        )

    def _why_not_spread(self) -> str | None:
        # XLA does not know how to cut a kernel: it refuses on TPU, and gathers the arrays on GPU.
        return (
            "the arrays are spread over a mesh; call it in jax.shard_map" if self.spread else None
        )

    def __str__(self) -> str:
        return f"{self.platform} ({self.kind})"


class Candidate[F: Callable[..., object]](NamedTuple):
    """An implementation; why_not says why it cannot run, None where it can."""

    run: F
    why_not: str | None = None


def target(*arrays: jax.Array | None) -> Target:
    """The device of the arrays; for traced ones that of the mesh in context, else the default."""
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return _describe(next(iter(x.devices())))._replace(spread=len(x.devices()) > 1)
    mesh = jax.sharding.get_abstract_mesh()
    described = mesh.abstract_device
    if described is not None:
        platform = "tpu" if described.device_kind.startswith("TPU") else described.platform
        spread = any(n > 1 for name, n in mesh.shape.items() if name not in mesh.manual_axes)
        return Target(platform, described.device_kind, described.num_cores or 1, spread)
    default = jax.config.jax_default_device
    return _describe(default if isinstance(default, jax.Device) else jax.local_devices()[0])


def _describe(device: jax.Device) -> Target:
    return Target(device.platform, device.device_kind, getattr(device, "core_count", None) or 1)


def resolve[F: Callable[..., object]](
    op: str, implementation: str | None, candidates: Mapping[str, Candidate[F]]
) -> F:
    """Returns the function to run for `op`.

    Args:
      op: Name of the op, for the message.
      implementation: One of `NAMES`, or None for the first that can run.
      candidates: The implementations of this op, best first.

    Raises:
      UnavailableError: The name is unknown, or its implementation cannot run here. Nothing is
        ever replaced silently.
    """
    able = [name for name, candidate in candidates.items() if candidate.why_not is None]
    if implementation is None:
        return candidates[able[0]].run
    known = ", ".join(able)
    if implementation not in candidates:
        what = "has no" if implementation in NAMES else "does not know the implementation"
        raise UnavailableError(f"{op} {what} {implementation!r}; available: {known}")
    candidate = candidates[implementation]
    if candidate.why_not is not None:
        raise UnavailableError(
            f"{op}: {implementation!r} cannot run: {candidate.why_not}; available: {known}"
        )
    return candidate.run
