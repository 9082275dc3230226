"""Counts against a chip's rates: memory, roofline, throughput, cost; and the search for a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from mmjax.config import ModelConfig
from mmjax.plan import counts
from mmjax.plan.chips import Number, PlanError, Topology
from mmjax.plan.counts import Collective, Work
from mmjax.plan.job import Job
from mmjax.sharding import MESH_AXES, ShardingError


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one step takes on each device of a topology.

    Attributes:
      job, topology: What was asked.
      mesh: Size of each mesh axis.
      memory: Bytes on one device, by what they are.
      work: What a device computes.
      collectives: What it sends and receives, and the seconds of each.
      flops_model: That the model needs, all devices; 3 forward passes for a train step.
      flops: That one device spends, recomputing included.
      hbm_bytes: That one device moves.
      seconds: Of each term of the roofline.
    """

    job: Job
    topology: Topology
    mesh: Mapping[str, int]
    memory: Mapping[str, Number]
    work: tuple[Work, ...]
    collectives: tuple[tuple[Collective, Number], ...]
    flops_model: Number
    flops: Number
    hbm_bytes: Number
    seconds: Mapping[str, Number]

    @property
    def peak(self) -> Number:
        """Bytes of HBM on the fullest device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within what a program may use."""
        return self.peak <= self.topology.chip.hbm

    @property
    def bound(self) -> Number:
        """Seconds of a step if everything overlaps: the longest term."""
        return max(self.seconds.values())

    @property
    def serial(self) -> Number:
        """Seconds of a step if nothing overlaps: the sum of the terms."""
        return sum(self.seconds.values())

    @property
    def binds(self) -> str:
        """The longest term."""
        return max(self.seconds, key=lambda term: self.seconds[term])

    @property
    def mfu(self) -> Number:
        """Upper bound of the model FLOPs utilisation: model FLOPs / (devices · peak · bound)."""
        return self.flops_model / (self.topology.devices * self.topology.chip.flops * self.bound)

    @property
    def tokens_per_second(self) -> Number:
        """Tokens that all devices together take in (train, prefill) or give (decode), at most."""
        return self.job.new_tokens / self.bound


def estimate(job: Job, topology: Topology, mesh: Mapping[str, int]) -> Estimate:
    """Counts one step.

    Terms: compute = bf16 FLOPs / peak + float32 FLOPs / their own peak; HBM = bytes / rate;
    network = the sum over collectives of bytes · (n - 1) / n / rate, twice for a reduction, and
    the exchange of `Topology.exchange_seconds`.

    Args:
      job: What a step does.
      topology: Where.
      mesh: Size of each axis; those not named are 1, one may be -1 for what is left.

    Raises:
      PlanError: the mesh does not fit the devices or the job.
      ShardingError: it does not divide the model.
    """
    mesh = complete_mesh(mesh, topology)
    _check_job(job, mesh)
    params = counts.parameters(job, mesh)
    work = counts.device_work(job, mesh, topology.chip)
    moved = [(c, _seconds(c, mesh, topology)) for c in counts.collectives(job, mesh, params)]
    train = job.kind == "train"
    exact = sum(w.forward * w.passes + w.backward * train for w in work if w.exact)
    spent = sum(w.forward * w.passes + w.backward * train for w in work)
    hbm = sum(w.forward_bytes * w.passes + w.backward_bytes * train for w in work)
    hbm += counts.optimizer_bytes(job, sum(p.local for p in params))
    hbm += sum(c.size for c, _ in moved if c.name == "weights")  # written where they are gathered
    chip = topology.chip
    needed = sum(w.model for w in work) * (3 if train else 1)
    return Estimate(
        job,
        topology,
        mesh,
        counts.memory(job, mesh, params),
        tuple(work),
        tuple(moved),
        # A device repeats the router of its `model` group; the model needs it once.
        needed * topology.devices - _repeated(work, mesh, topology, train),
        spent,
        hbm,
        {
            "compute": (spent - exact) / chip.flops + exact / chip.exact_flops,
            "HBM": hbm / chip.hbm_rate,
            "network": sum(seconds for _, seconds in moved),
        },
    )


def _repeated(work: list[Work], mesh: Mapping[str, int], topology: Topology, train: bool) -> Number:
    router = sum(w.model for w in work if w.name == "router") * (3 if train else 1)
    return router * topology.devices * (1 - 1 / mesh["model"])


def _seconds(collective: Collective, mesh: Mapping[str, int], topology: Topology) -> Number:
    if collective.kind == "exchange":
        return topology.exchange_seconds(mesh, collective.axes[0], collective.size)
    size = math.prod(mesh[axis] for axis in collective.axes)
    twice = 2 if collective.kind == "reduce" else 1
    moved = twice * collective.size * (size - 1) / size
    return moved / topology.gather_rate(mesh, collective.axes)


def complete_mesh(mesh: Mapping[str, int], topology: Topology) -> dict[str, int]:
    """All four axes of a mesh that takes every device.

    Raises:
      PlanError: an unknown axis, or sizes that do not multiply to the devices.
    """
    unknown = sorted(set(mesh) - set(MESH_AXES))
    if unknown:
        raise PlanError(f"unknown mesh axis {', '.join(unknown)}; known: {', '.join(MESH_AXES)}")
    sizes = {axis: mesh.get(axis, 1) for axis in MESH_AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) == 1:
        rest = math.prod(size for size in sizes.values() if size != -1)
        sizes[open_axes[0]] = topology.devices // max(rest, 1)
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != topology.devices:
        raise PlanError(
            f"mesh {show_mesh(sizes)} has {math.prod(sizes.values())} devices, {topology.name} has "
            f"{topology.devices}; change the sizes, give one axis -1 for what is left, or say auto"
        )
    return sizes


def show_mesh(mesh: Mapping[str, int]) -> str:
    """data=16,expert=32: the axes larger than 1."""
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n != 1) or "data=1"


def _check_job(job: Job, mesh: Mapping[str, int]) -> None:
    cfg = job.model
    if cfg.num_experts % mesh["expert"]:
        raise PlanError(
            f"{cfg.num_experts} experts do not divide over expert={mesh['expert']}; "
            f"choose one of {_divisors(cfg.num_experts)}"
        )
    rows = mesh["data"] * mesh["expert"]
    if job.batch % rows:
        raise PlanError(
            f"a batch of {job.batch} rows does not divide over data·expert = {rows}; "
            "change --batch or the mesh"
        )
    if job.length % mesh["context"]:
        raise PlanError(
            f"{job.length} tokens do not divide over context={mesh['context']}; "
            "change --length or the mesh"
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def best_meshes(job: Job, topology: Topology, count: int = 5) -> list[Estimate]:
    """The meshes with the shortest step, those that fit in memory first.

    Args:
      job: What a step does.
      topology: Its devices are cut in every way over data, context, expert and model that
        divides the batch, the row, experts, heads, ffn and vocabulary.
      count: Meshes to return.

    Raises:
      PlanError: no mesh divides the job.
    """
    found = []
    for mesh in _candidates(job, topology):
        try:
            found.append(estimate(job, topology, mesh))
        except ShardingError:
            continue
    if not found:
        raise PlanError(
            f"no mesh of {topology.devices} devices divides a batch of {job.batch} rows of "
            f"{job.length} tokens, {job.model.num_experts} experts and "
            f"{job.model.num_kv_heads} KV heads; change --batch or the topology"
        )
    found.sort(key=lambda e: (not e.fits, e.bound, e.serial))
    return found[:count]


def _candidates(job: Job, topology: Topology) -> Iterator[dict[str, int]]:
    devices, cfg = topology.devices, job.model
    for expert in _divisors(math.gcd(devices, cfg.num_experts)):
        for model in _divisors(math.gcd(devices // expert, cfg.num_kv_heads)):
            for data in _divisors(math.gcd(devices // (expert * model), job.batch)):
                context = devices // (expert * model * data)
                one_token = job.kind == "decode" and context > 1
                if job.batch % (data * expert) or job.length % context or one_token:
                    continue
                yield {"data": data, "context": context, "expert": expert, "model": model}


@dataclasses.dataclass(frozen=True)
class Bill:
    """Hours on all chips, and chip-hours; `price` is for one chip-hour."""

    hours: Number
    chip_hours: Number
    price: Number | None

    @property
    def cost(self) -> Number | None:
        """In the price's currency; None without one."""
        return None if self.price is None else self.chip_hours * self.price


def bill(topology: Topology, seconds: Number, price: Number | None) -> Bill:
    """What `seconds` on a topology come to."""
    hours = seconds / 3600
    return Bill(hours, hours * topology.chips, price)


@dataclasses.dataclass(frozen=True)
class Reinforcement:
    """An RL budget: `steps` rollouts of `completions` completions of `tokens` tokens, each trained
    on once (M1 splits a rollout into 16 updates).
    """

    steps: int
    completions: int
    tokens: int

    @property
    def total(self) -> int:
        """Tokens generated, and trained on."""
        return self.steps * self.completions * self.tokens


def generation(model: ModelConfig, budget: Reinforcement, topology: Topology) -> Estimate:
    """The decode step of an RL job: the most rows at a time that fit, in their best mesh.

    The cache holds `tokens` tokens a row; the step is priced at half of them, the average.

    Raises:
      PlanError: not even one row a device group fits.
    """
    batch = budget.completions
    while batch >= 1:
        full = Job("decode", model, batch, budget.tokens)
        try:
            best = best_meshes(full, topology, 1)[0]
        except PlanError:
            best = None
        if best is not None and best.fits:
            half = dataclasses.replace(full, length=max(budget.tokens // 2, 1))
            return estimate(half, topology, best.mesh)
        batch //= 2
    raise PlanError(
        f"no batch of completions of {budget.tokens} tokens fits {topology.name}; take more chips"
    )
