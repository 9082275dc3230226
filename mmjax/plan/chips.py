"""Chips by name, and how they are wired: TPU slices and GPU clusters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from mmjax.sharding import MESH_AXES

GIB = 2**30

type Number = int | float


class PlanError(ValueError):
    """A plan that cannot be made or does not fit; the message says why and the way out."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind. All rates are per second and per device, bytes or FLOPs.

    Attributes:
      name: As `--topology` knows it.
      flops: Peak dense bf16.
      exact_flops: Peak of products in true float32 (the router; a float32 model's LM head): six
        bf16 passes on a TPU, the vector units on a GPU.
      hbm: Bytes that a program may use.
      hbm_rate: Of the HBM.
      link: One direction of one ICI link, or of all NVLinks of a GPU together.
      network: One direction of the data-centre network.
      dims: Dimensions of the ICI torus; 0 for a GPU, whose NVLink switch is flat.
      domain: GPUs of one NVLink domain; 0 for a TPU, whose domain is the slice.
      per_chip: JAX devices that one chip shows.
    """

    name: str
    flops: Number
    exact_flops: Number
    hbm: int
    hbm_rate: Number
    link: Number
    network: Number
    dims: int = 0
    domain: int = 0
    per_chip: int = 1

    @property
    def is_tpu(self) -> bool:
        """Whether `--compile` has a compiler for it."""
        return self.dims > 0


def _tpu(
    name: str,
    tflops: Number,
    hbm_gib: Number,
    hbm_gb_s: Number,
    link_gb_s: Number,
    network_gb_s: Number,
    dims: int,
    per_chip: int = 1,
) -> Chip:
    """A TPU from its data sheet, per chip except `hbm_gib`, which is per device."""
    part = 1e9 / per_chip
    return Chip(
        name,
        flops=tflops * 1e3 * part,
        exact_flops=tflops * 1e3 * part / 6,  # Precision.HIGHEST is six bf16 passes.
        hbm=int(hbm_gib * GIB),
        hbm_rate=hbm_gb_s * part,
        link=link_gb_s * part,
        network=network_gb_s * part,
        dims=dims,
        per_chip=per_chip,
    )


def _gpu(
    name: str,
    tflops: Number,
    fp32_tflops: Number,
    hbm_gb: Number,
    hbm_gb_s: Number,
    link_gb_s: Number,
    network_gb_s: Number,
    domain: int,
) -> Chip:
    return Chip(
        name,
        flops=tflops * 1e12,
        exact_flops=fp32_tflops * 1e12,
        # XLA leaves a sixteenth to the driver, NCCL and fragmentation.
        hbm=int(hbm_gb * 1e9 * 15 / 16),
        hbm_rate=hbm_gb_s * 1e9,
        link=link_gb_s * 1e9,
        network=network_gb_s * 1e9,
        domain=domain,
    )


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} for peak, HBM rate and ICI, whose
# "bidirectional bandwidth per chip" over twice the links is one direction of one link; v4's 50 GB/s
# a link is of Jouppi et al. 2023 (arXiv 2304.01433). Network: documented for v5p (50 Gb/s a chip)
# and v5e (6.4 Tb/s a pod of 256), taken as 50 Gb/s for v4, 100 Gb/s for v6e and tpu7x. Usable HBM
# is what libtpu's compiler has ("exceeds available HBM (…G)"), less than the data sheet's.
# GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, DGX B200 (1,440 GB, 64 TB/s and 72
# dense FP8 PFLOP/s by eight GPUs) and GB200 NVL72 (13.4 TB, 576 TB/s and 180 dense bf16 PFLOP/s by
# 72), dense rates; network: one HDR (A100) or NDR adapter a GPU.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275, 30.75, 1228, 50, 6.25, dims=3),
        _tpu("v5e", 197, 15.75, 819, 50, 3.125, dims=2),
        _tpu("v5p", 459, 95.73, 2765, 100, 6.25, dims=3),
        _tpu("v6e", 918, 31.24, 1638, 100, 12.5, dims=2),
        _tpu("tpu7x", 2307, 94.74, 7380, 100, 12.5, dims=3, per_chip=2),
        _gpu("a100", 312, 19.5, 80, 2039, 300, 25, domain=8),
        _gpu("h100", 989, 67, 80, 3350, 450, 50, domain=8),
        _gpu("h200", 989, 67, 141, 4800, 450, 50, domain=8),
        _gpu("b200", 2250, 75, 180, 8000, 900, 50, domain=8),
        _gpu("gb200", 2500, 80, 186, 8000, 900, 50, domain=72),
    )
}


# How JAX's devices call themselves; the first that is part of the name.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7": "tpu7x",
    "TPU v7": "tpu7x",
    "GH200": "h100",
    "H200": "h200",
    "H100": "h100",
    "A100": "a100",
    "GB200": "gb200",
    "B200": "b200",
}


def chip_of(kind: str) -> Chip | None:
    """The chip of a device that calls itself so; None for one that is not known."""
    name = next((chip for part, chip in _KINDS.items() if part in kind), None)
    return None if name is None else CHIPS[name]


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and their wiring.

    Attributes:
      name: As the user wrote it.
      chip: What it is made of.
      shape: Chips along each dimension of one slice; (count,) for GPUs.
      slices: TPU slices, joined by the data-centre network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips in all, what a price is for."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices in all, what a mesh is made of."""
        return self.chips * self.chip.per_chip

    @property
    def domain(self) -> int:
        """Devices that reach each other without the data-centre network."""
        return self.chip.domain or math.prod(self.shape) * self.chip.per_chip

    def gather_rate(self, mesh: Mapping[str, int], axes: Sequence[str]) -> Number:
        """Bytes a second into one device in an all-gather or a reduce-scatter over mesh axes.

        Inside a slice: link · (2 for each ring and 1 for each line that the axes fill), see
        `extents`. Inside an NVLink domain: the GPU's NVLinks. Beyond either: the adapters of all m
        devices of the group that share a domain, m · network.
        """
        size, inside = self._group(mesh, axes)
        fast = self.chip.link
        if self.chip.is_tpu:
            filled = self.extents(mesh, axes)
            fast *= sum(1 + ring for n, ring in filled if n > 1) or 1
        return fast if inside == size else min(fast, self.chip.network * inside)

    def exchange_seconds(self, mesh: Mapping[str, int], axis: str, size_bytes: Number) -> Number:
        """Seconds of an all-to-all in which each device sends `size_bytes` in n equal parts.

        In a torus, n devices along a dimension put size · n / 8 on each link and direction of a
        ring, size · n / 4 on the middle of a line; the busiest dimension counts. NVLink and
        network carry what leaves a GPU and a domain.
        """
        size, inside = self._group(mesh, (axis,))
        near = size_bytes * (inside - 1) / size
        if self.chip.is_tpu:
            filled = self.extents(mesh, (axis,))
            near = max(size_bytes * inside / size * n / (8 if ring else 4) for n, ring in filled)
        return near / self.chip.link + size_bytes * (1 - inside / size) / self.chip.network

    def extents(self, mesh: Mapping[str, int], axes: Sequence[str]) -> list[tuple[int, bool]]:
        """Devices that mesh axes span along each dimension of a slice, and whether they close a
        ring: devices are numbered row by row, and `model` is the mesh's innermost axis. 3D tori
        close in multiples of 4, 2D ones at a pod's full 16.
        """
        closed = (lambda n: n % 4 == 0) if self.chip.dims == 3 else (lambda n: n == 16)
        shape = [*self.shape, *([self.chip.per_chip] if self.chip.per_chip > 1 else [])]
        left = list(shape)  # places of each dimension that no inner axis has taken
        spans = [1] * len(shape)
        for axis in reversed(MESH_AXES):
            size = mesh[axis]
            for dim in reversed(range(len(shape))):
                taken = math.gcd(size, left[dim])
                size, left[dim] = size // taken, left[dim] // taken
                spans[dim] *= taken if axis in axes else 1
        return [(s, s == n and closed(n)) for s, n in zip(spans, shape, strict=True)]

    def _group(self, mesh: Mapping[str, int], axes: Sequence[str]) -> tuple[int, int]:
        """Devices of one group over `axes`, and how many of them share a domain."""
        size = math.prod(mesh[axis] for axis in axes)
        if self.chip.is_tpu:
            return size, math.prod(n for n, _ in self.extents(mesh, axes))
        last = max(MESH_AXES.index(axis) for axis in axes)
        stride = math.prod(mesh[axis] for axis in MESH_AXES[last + 1 :])
        return size, max(1, min(size, self.domain // stride))


def parse_topology(text: str) -> Topology:
    """Reads "v5p:8x8x8", "2*v6e:16x16" (two slices) or "h200:64".

    Raises:
      PlanError: unknown chip, or a shape that it does not come in.
    """
    head, _, shape = text.partition(":")
    count, star, name = head.rpartition("*")
    chip = CHIPS.get(name.lower())
    if chip is None:
        raise PlanError(f"topology {text!r}: unknown chip {name!r}; known: {', '.join(CHIPS)}")
    example = "x".join(["4"] * chip.dims) if chip.is_tpu else "64"
    problem = f"topology {text!r} is no shape of {chip.name}; write {chip.name}:{example}"
    sizes = shape.split("x")
    if not all(s.isdecimal() and int(s) > 0 for s in [*sizes, count if star else "1"]):
        raise PlanError(problem)
    dims = tuple(map(int, sizes))
    slices = int(count) if star else 1
    if chip.is_tpu:
        _check_slice(text, chip, dims)
    elif len(dims) > 1 or star:
        raise PlanError(problem)
    return Topology(text, chip, dims, slices)


def _check_slice(text: str, chip: Chip, dims: tuple[int, ...]) -> None:
    """A slice is whole hosts of 2 x 2 chips, or a part of one host."""
    limit = {"v5e": 256, "v6e": 256, "v4": 4096, "v5p": 8960, "tpu7x": 9216}[chip.name]
    example = {2: "2x4, 4x4, 16x16", 3: "2x2x1, 4x4x4, 8x8x8"}[chip.dims]
    whole_hosts = dims[0] % 2 == 0 and len(dims) > 1 and dims[1] % 2 == 0
    if len(dims) != chip.dims or not (whole_hosts or math.prod(dims) == 1):
        raise PlanError(
            f"topology {text!r}: {chip.name} slices have {chip.dims} dimensions, the first two "
            f"even (hosts hold 2x2 chips), such as {example}"
        )
    if math.prod(dims) > limit:
        raise PlanError(
            f"topology {text!r} has {math.prod(dims)} chips, a {chip.name} pod {limit}; write "
            f"2*{chip.name}:… for two slices"
        )
