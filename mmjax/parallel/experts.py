"""Expert parallelism: tokens travel over the `expert` mesh axis to the devices of their experts.

Everything here runs in one `jax.shard_map`. Each device routes its own N tokens. Its token-slots,
k for each token, go to the device that owns their expert by an all-to-all, visit the expert
there, and come back to be weighted and summed.

Static shapes and no dropped token together need buffers for the worst case, every slot to one
device, or several rounds. Here an exchange has room for `HEADROOM` times an even share of slots
between each pair of devices, and what does not fit waits for a further round: their number is
decided while running, usually none, whatever the routing. Tokens go in `PARTS`, so that XLA can
move one part while it computes another. On P expert devices one part sends, receives and returns

    R = P · ⌈HEADROOM · N k / (PARTS · P)⌉ rows of D values,

and its experts' hidden rows are [R, F]: for N 8192, k 2, D 6144 in bfloat16, 144 MiB for each of
the three buffers, with any P. A further round has buffers of the same size.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32

from kernels_pallas import dispatch
from mmjax.layers.experts import (
    Rows,
    Weights,
    apply_experts,
    inverse,
    return_rows,
    take_rows,
    turns,
    visit_experts,
    weighted_sum,
)
from mmjax.layers.int8 import Int8Matrices
from mmjax.layers.router import RouterStats, route
from mmjax.sharding import DEFAULT_RULES, MESH_AXES, ShardingError, active_mesh

# Over these the experts' matrices lie as `ShardingRules` spreads d_model, `expert` being taken.
FSDP_AXES = tuple(axis for axis in DEFAULT_RULES.d_model if axis not in DEFAULT_RULES.experts)
# Parts of the tokens whose exchange and experts may overlap.
PARTS = 2
# Room of an exchange over what even routing fills.
HEADROOM = 1.5
# Up to this many tokens on all devices of the expert axis together, gathering them is cheaper than
# exchanging them: the experts are read from memory for the same time anyway.
FEW_TOKENS = 256


class Plan(NamedTuple):
    """How one layer's tokens lie on the mesh, and how they move.

    spread: mesh axes over which D of the experts' matrices lies until used; batch_axes,
    sequence_axes: mesh axes over which rows, and each row, are spread; devices: of the expert axis;
    experts: E of all of them; top_k; capacity: visits that an expert takes of the whole batch, 0
    for all; exchange: all-to-all, else gather tokens; ragged: the all-to-all leaves out rows
    without a token-slot.
    """

    spread: tuple[str, ...]
    batch_axes: tuple[str, ...]
    sequence_axes: tuple[str, ...]
    devices: int
    experts: int
    top_k: int
    capacity: int
    exchange: bool
    ragged: bool

    @property
    def local_experts(self) -> int:
        """Experts of one device."""
        return self.experts // self.devices

    @property
    def partial_axes(self) -> tuple[str, ...]:
        """Mesh axes whose devices each hold a summand of the same tokens' output."""
        return ("model",) if "expert" in self.batch_axes else ("expert", "model")

    def room(self, tokens: int) -> int:
        """Rows of an exchange between two devices for this many tokens of each."""
        even = -(-int(HEADROOM * tokens * self.top_k) // self.devices)
        return max(1, min(even, tokens * min(self.top_k, self.local_experts)))


def apply_sharded_experts(
    x: Float[Array, "B T D"],
    real: Bool[Array, "B T"],
    router: Float32[Array, "D E"],
    kernels: Weights,
    *,
    top_k: int,
    capacity: int,
    spread: tuple[str, ...] = (),
) -> tuple[Float32[Array, "B T D"], RouterStats]:
    """Routes x and applies its experts on the mesh in context, as one device would.

    Rows lie over (data, expert) and each row over context, as far as the shape divides; w1 and w3
    over (expert, spread, model), w2 over (expert, model, spread). What lies over `spread` is
    gathered just before use, its gradient scattered.

    Args:
      x: Layer input.
      real: Which tokens are no padding.
      router: Its kernel.
      kernels: Of all experts.
      top_k: Experts a token visits.
      capacity: Token-slots that each expert takes of the whole batch, in token order; 0 for all.
      spread: Mesh axes over which D of the kernels lies: FSDP_AXES as training has them, none to
        serve.

    Returns:
      The experts' weighted sum, and the router's statistics over the whole batch.

    Raises:
      ShardingError: the mesh does not divide the experts.

    Source: MiniMax-01 (arXiv 2501.08313), sections 2.1 and 3.1.
    """
    mesh = active_mesh()
    assert mesh is not None
    _check_division(kernels.w1.shape, dict(mesh.shape), spread)
    experts = kernels.w1.shape[0]
    plan = _plan(x.shape, experts, dict(mesh.shape), top_k, capacity, spread)
    rows, sequence = plan.batch_axes or None, plan.sequence_axes or None
    tokens, summed = P(rows, sequence), P((*plan.batch_axes, *plan.sequence_axes) or None)
    into, back = P("expert", spread or None, "model"), P("expert", "model", spread or None)
    specs = map(_lies, kernels, (into, into, back))
    out, sums, logits = jax.shard_map(
        partial(_on_device, plan),
        in_specs=(tokens, tokens, P(), *specs),
        out_specs=(P(plan.partial_axes, rows, sequence), summed, tokens),
        check_vma=False,  # kernels say nothing about how their results vary
    )(x, real, router, *kernels)
    # Sums over devices are taken out here, where their transpose is known to move nothing.
    return out.sum(0), RouterStats._make([*(s.sum(0) for s in sums), logits])


def _lies(kernel: jax.Array | Int8Matrices, spec: P) -> P | Int8Matrices:
    """How a kernel lies: the scales of int8 ones as their columns do."""
    if not isinstance(kernel, Int8Matrices):
        return spec
    return Int8Matrices(spec, P(spec[0], None, spec[2]))  # type: ignore[arg-type]


def _plan(
    shape: tuple[int, ...],
    experts: int,
    mesh: dict[str, int],
    top_k: int,
    capacity: int,
    spread: tuple[str, ...],
) -> Plan:
    batch, length, _ = shape
    # What does not divide stays whole: a single row to decode is on every device.
    choices: list[tuple[str, ...]] = [("data", "expert"), ("data",), ()]
    batch_axes = next(c for c in choices if batch % math.prod(mesh[a] for a in c) == 0)
    sequence_axes = () if length % mesh["context"] else ("context",)
    apart = "expert" in batch_axes and mesh["expert"] > 1
    together = batch * length // (mesh["data"] * (mesh["context"] if sequence_axes else 1))
    return Plan(
        spread,
        batch_axes,
        sequence_axes,
        devices=mesh["expert"],
        experts=experts,
        top_k=top_k,
        capacity=capacity,
        exchange=apart and together > FEW_TOKENS,
        # On GPUs it corrupted gradients (marin #8077) and crashed (xla #47283); CPUs have none.
        ragged=dispatch.target().platform == "tpu",
    )


def _check_division(shape: tuple[int, ...], mesh: dict[str, int], spread: tuple[str, ...]) -> None:
    sizes = zip(("num_experts", "hidden_size", "intermediate_size"), shape, strict=True)
    wrong = [
        f"{name} {size} over {'·'.join(f'{a}={mesh[a]}' for a in axes)}"
        for (name, size), axes in zip(sizes, (("expert",), spread, ("model",)), strict=True)
        if size % math.prod(mesh[a] for a in axes)
    ]
    if wrong:
        raise ShardingError(
            f"the mesh does not divide the experts: {', '.join(wrong)}; choose sizes that do"
        )


def _on_device(
    plan: Plan,
    x: jax.Array,
    real: jax.Array,
    router: jax.Array,
    *kernels: jax.Array | Int8Matrices,
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """The part of one device; sums over devices are left to the caller, on a new first axis."""
    routing, stats = route(
        x,
        real,
        router,
        plan.top_k,
        plan.capacity,
        batch_axes=plan.batch_axes,
        sequence_axes=plan.sequence_axes,
    )
    move = _exchanged if plan.exchange else _gathered
    tokens = x.reshape(-1, x.shape[-1])
    out = move(plan, tokens, *routing, _gather_whole(plan, Weights(*kernels), x.dtype))
    *sums, logits = stats
    return out.reshape(1, *x.shape), [s[None] for s in sums], logits


def _gather_whole(plan: Plan, kernels: Weights, dtype: jnp.dtype) -> Weights:
    """This device's experts, D whole; the transpose scatters the summed gradient."""
    if not plan.spread:
        return kernels

    def gather(kernel: jax.Array | Int8Matrices, axis: int) -> jax.Array:
        return jax.lax.all_gather(kernel.astype(dtype), plan.spread, axis=axis, tiled=True)

    return Weights(gather(kernels.w1, 1), gather(kernels.w3, 1), gather(kernels.w2, 2))


def _gathered(
    plan: Plan, tokens: jax.Array, share: jax.Array, expert: jax.Array, kernels: Weights
) -> jax.Array:
    """Every device applies its experts to all tokens of the axis; their sums go back."""
    over_experts = plan.devices > 1 and "expert" in plan.batch_axes
    if over_experts:
        tokens, share, expert = (
            jax.lax.all_gather(a, "expert", tiled=True) for a in (tokens, share, expert)
        )
    mine = expert - jax.lax.axis_index("expert") * plan.local_experts
    mine = jnp.where((mine >= 0) & (mine < plan.local_experts), mine, plan.local_experts)
    out = apply_experts(tokens, share, mine, kernels).astype(jnp.float32)
    return jax.lax.psum_scatter(out, "expert", tiled=True) if over_experts else out


def _exchanged(
    plan: Plan, tokens: jax.Array, share: jax.Array, expert: jax.Array, kernels: Weights
) -> jax.Array:
    """All token-slots to their experts and back, in parts and, for what is left, further rounds."""
    count = tokens.shape[0]
    room = plan.room(-(-count // PARTS))
    ends = [count * (i + 1) // PARTS for i in range(PARTS)]
    outs, late = [], []
    for start, end in zip([0, *ends], ends, strict=False):
        visits = Visits(expert[start:end], _place(plan, expert[start:end]))
        values = Values(tokens[start:end], share[start:end], kernels)
        outs.append(_round(plan, room, visits, values))
        late.append(visits.place >= room)
    waiting = jnp.where(jnp.concatenate(late), expert, plan.experts)
    visits = Visits(waiting, _place(plan, waiting))
    # One number for the whole mesh: all devices must meet in the same exchanges.
    rounds = jax.lax.pmax((visits.place.max() + room) // room, MESH_AXES)
    return jnp.concatenate(outs) + _rounds(
        plan, room, rounds, visits, Values(tokens, share, kernels)
    )


class Visits(NamedTuple):
    """expert [N, k]; place [N, k]: turn of the visit on its device, negative for none."""

    expert: jax.Array
    place: jax.Array


class Values(NamedTuple):
    """What a round is differentiable in: tokens [N, D], share [N, k], kernels."""

    tokens: jax.Array
    share: jax.Array
    kernels: Weights


def _place(plan: Plan, expert: jax.Array) -> jax.Array:
    """How many earlier token-slots go to the same device [N, k], -1 for a visit to none."""
    place, _ = turns(expert.reshape(-1) // plan.local_experts, plan.devices)
    return place.reshape(expert.shape)


def _round(plan: Plan, room: int, visits: Visits, values: Values) -> jax.Array:
    """One exchange: the visits with 0 <= place < room, weighted and summed [N, D] in float32."""
    rows = _rows(plan, room, visits)
    to = _at_expert(plan, visits.expert, rows)  # [P room]
    arriving = jax.lax.all_to_all(to, "expert", 0, 0, tiled=True)
    sizes = [(ids < plan.local_experts).reshape(-1, room).sum(1) for ids in (to, arriving)]
    sent, received = (s.astype(jnp.int32) for s in sizes)
    swap = partial(_swap, plan.ragged)
    x = swap(take_rows(values.tokens, rows), sent, received)
    out = visit_experts(x, arriving[:, None], values.kernels)[:, 0]
    back = swap(out, received, sent)
    return weighted_sum(return_rows(back, rows), values.share)


def _rows(plan: Plan, room: int, visits: Visits) -> Rows:
    """The buffer to send, `room` rows for each device."""
    device = visits.expert // plan.local_experts
    taken = (visits.place >= 0) & (visits.place < room)
    slot = jnp.where(taken, device * room + visits.place, plan.devices * room)
    return Rows(inverse(slot.reshape(-1), plan.devices * room), slot)


def _at_expert(plan: Plan, expert: jax.Array, rows: Rows) -> jax.Array:
    """Which of its device's experts each row visits; `local_experts` for a row without a slot."""
    flat = expert.reshape(-1) % plan.local_experts
    return flat.at[rows.source].get(mode="fill", fill_value=plan.local_experts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swap(ragged: bool, rows: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
    """Rows [P room, D], of which each device p gets the first sent[p] of its `room`."""
    if not ragged:
        return jax.lax.all_to_all(rows, "expert", 0, 0, tiled=True)
    devices = sent.shape[0]
    room = rows.shape[0] // devices
    here = jax.lax.axis_index("expert")
    return jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros_like(rows),
        input_offsets=jnp.arange(devices, dtype=jnp.int32) * room,
        send_sizes=sent,
        output_offsets=jnp.full(devices, here * room, jnp.int32),
        recv_sizes=received,
        axis_name="expert",
    )


def _swap_forward(
    ragged: bool, rows: jax.Array, sent: jax.Array, received: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _swap(ragged, rows, sent, received), (sent, received)


def _swap_backward(
    ragged: bool, sizes: tuple[jax.Array, jax.Array], d_rows: jax.Array
) -> tuple[jax.Array, None, None]:
    sent, received = sizes
    return _swap(ragged, d_rows, received, sent), None, None


_swap.defvjp(_swap_forward, _swap_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounds(plan: Plan, room: int, rounds: jax.Array, visits: Visits, values: Values) -> jax.Array:
    """The sum over `rounds` exchanges; the backward pass repeats them rather than store them."""

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + _round(plan, room, _after(visits, i * room), values)

    return jax.lax.fori_loop(0, rounds, body, jnp.zeros(values.tokens.shape, jnp.float32))


def _after(visits: Visits, places: jax.Array) -> Visits:
    return visits._replace(place=visits.place - places)


def _rounds_forward(
    plan: Plan, room: int, rounds: jax.Array, visits: Visits, values: Values
) -> tuple[jax.Array, tuple[jax.Array, Visits, Values]]:
    return _rounds(plan, room, rounds, visits, values), (rounds, visits, values)


def _rounds_backward(
    plan: Plan, room: int, saved: tuple[jax.Array, Visits, Values], d_out: jax.Array
) -> tuple[None, None, Values]:
    rounds, visits, values = saved

    def body(i: jax.Array, total: Values) -> Values:
        _, pull = jax.vjp(partial(_round, plan, room, _after(visits, i * room)), values)
        return jax.tree.map(jnp.add, total, pull(d_out)[0])

    return None, None, jax.lax.fori_loop(0, rounds, body, jax.tree.map(jnp.zeros_like, values))


_rounds.defvjp(_rounds_forward, _rounds_backward)
