"""Attention on a mesh: batch and heads stay where they are, the sequence is shared by collectives.

Every attention call of the layers goes through this module. Without a mesh, or on one device, it
calls the op and nothing else. Otherwise the op runs inside `jax.shard_map` on local arrays, so
that the platform's kernels can be taken: batch over (`data`, `expert`), heads and KV heads over
`model`, the sequence over `context` in stretches of equal length, one a rank.

What a layer moves over `context` of n ranks, for B rows and H heads a device:

- lightning (LASP+): one all-gather of states, n B H K V float32, whatever the length, and four
  integers a row. The gradient is one reduce-scatter of the same size.
- softmax: one all-gather of keys and of values, B T G K each, of places and segment ids, B T
  integers each, and half-stretches of queries and outputs sent once each, 2 B T/n H K. The gradient
  moves the same the other way, integers apart. Every rank does the same work under a causal mask.
- on a cache: as softmax, for prefill; nothing for one token, where ranks repeat each other. The
  cache itself is whole on every rank of `context`, and one of pages on every rank but those of
  `model`, as the rows of an engine are whole everywhere while they attend.

KV heads are never repeated over `model`, so `model` has to divide them: at most 8 for M1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas import (
    lightning_attention,
    lightning_attention_step,
    paged_attention,
    write_pages,
)
from kernels_pallas.lightning_attention.clock import read_clock
from kernels_pallas.lightning_attention.step import as_one_pool
from kernels_pallas.numerics import einsum32
from mmjax.cache import PagedCache
from mmjax.layers.fused_softmax import self_attention
from mmjax.layers.softmax import softmax_attention
from mmjax.sharding import ShardingError, activation_spec, active_mesh

AXIS = "context"


def lightning(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay: Float32[Array, " H"],
    *,
    segment_ids: Int32[Array, "B T"] | None,
    state: Float32[Array, "B H K V"] | None,
) -> tuple[Float[Array, "B T H V"], Float32[Array, "B H K V"]]:
    """`kernels_pallas.lightning_attention` on the mesh in force; one token on a state is a step.

    Args:
      q: Queries [B, T, H, K].
      k: Keys [B, T, H, K].
      v: Values [B, T, H, V].
      decay: Rates [H].
      segment_ids: [B, T], 0 is padding; None where every token is real and of one document.
      state: State before the first token, None for zeros.

    Returns:
      Output [B, T, H, V] and the state after the last real token of each whole row.

    Raises:
      ShardingError: the mesh does not divide the heads, or (without a state) the sequence.
    """
    mesh = active_mesh()
    if state is not None and q.shape[1] == 1:
        body: Callable[..., Any] = _step
        axis = None
    else:
        axis = _split_axis(mesh, q.shape[1], must=state is None)
        body = _local if axis is None else partial(lasp, axis=axis)
    if mesh is None:
        return body(q, k, v, decay, segment_ids, state)
    spec = _Specs(mesh, q.shape, axis, heads=q.shape[2])
    run = jax.shard_map(
        body,
        in_specs=(spec.heads, spec.heads, spec.heads, P("model"), spec.rows, spec.state),
        out_specs=(spec.heads, spec.state),
        check_vma=False,  # Kernels do not say over which axes their outputs vary.
    )
    return run(q, k, v, decay, segment_ids, state)


def softmax(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    index: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"] | None,
) -> Float[Array, "B T H K"]:
    """`softmax_attention` of a sequence to itself on the mesh in force.

    Args:
      q: Queries [B, T, H, K].
      k: Keys [B, T, G, K].
      v: Values [B, T, G, K].
      index: Place of each query in its row [B, T]; -1 for padding.
      segment_ids: [B, T]; None where all tokens are of one segment.

    Raises:
      ShardingError: the mesh does not divide the KV heads or the sequence.
    """
    mesh = active_mesh()
    axis = _split_axis(mesh, q.shape[1], must=True)
    if mesh is None:
        return self_attention(q, k, v, index, segment_ids)
    spec = _Specs(mesh, q.shape, axis, heads=q.shape[2], kv_heads=k.shape[2])

    def body(
        q: jax.Array, k: jax.Array, v: jax.Array, index: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        if axis is None:
            return self_attention(q, k, v, index, segment_ids)
        k, v = _gather_sequence((k, v), axis)
        return _attend(q, k, v, index, segment_ids, axis=axis)

    run = jax.shard_map(
        body,
        in_specs=(spec.heads,) * 3 + (spec.whole_rows,) * 2,
        out_specs=spec.heads,
        check_vma=False,
    )
    return run(q, k, v, index, segment_ids)


def softmax_on_cache(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    slots: Int32[Array, "B T"],
    keys: Float[Array, "N B S G K"],
    values: Float[Array, "N B S G K"],
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "B T H K"], Float[Array, "N B S G K"], Float[Array, "N B S G K"]]:
    """Writes keys and values into layer `layer` of the cache and attends over it.

    The cache is spread over batch and KV heads, and whole on every rank of `context`.

    Args:
      q: Queries [B, T, H, K].
      k: Keys [B, T, G, K].
      v: Values [B, T, G, K].
      slots: Cache slot of each token [B, T]; S or more for padding, which is not written.
      keys: Cached keys of all N softmax layers [N, B, S, G, K].
      values: Cached values [N, B, S, G, K].
      layer: Which of the N layers this is.

    Returns:
      Output [B, T, H, K] and the new keys and values.

    Raises:
      ShardingError: the mesh does not divide the KV heads.
    """
    mesh = active_mesh()
    axis = _split_axis(mesh, q.shape[1], must=False)
    body = partial(_write_and_attend, axis=axis)
    if mesh is None:
        return body(q, k, v, slots, keys, values, layer)
    spec = _Specs(mesh, q.shape, axis, heads=q.shape[2], kv_heads=k.shape[2])
    run = jax.shard_map(
        body,
        in_specs=(spec.heads,) * 3 + (spec.whole_rows, spec.cache, spec.cache, P()),
        out_specs=(spec.heads, spec.cache, spec.cache),
        check_vma=False,
    )
    return run(q, k, v, slots, keys, values, layer)


def lightning_on_pool(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay: Float32[Array, " H"],
    segment_ids: Int32[Array, "B T"] | None,
    cache: PagedCache,
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "B T H V"], Float32[Array, "M S H K V"]]:
    """`lightning` on the rows' states in layer `layer` of a pool, which are advanced in place.

    Returns:
      Output [B, T, H, V] and the pool [M, S, H, K, V].

    Raises:
      ShardingError: the mesh does not divide the heads.
    """
    mesh = active_mesh()
    axis = _split_axis(mesh, q.shape[1], must=False)
    body: Callable[..., Any] = (
        _step_on_pool if q.shape[1] == 1 else partial(_extend_pool, axis=axis)
    )
    args = (q, k, v, decay, segment_ids, cache.state, cache.slots, layer)
    if mesh is None:
        return body(*args)
    spec = _PoolSpecs(mesh, axis, heads=q.shape[2])
    run = jax.shard_map(
        body,
        in_specs=(*(spec.heads,) * 3, P("model"), spec.rows, spec.state, P(), P()),
        out_specs=(spec.heads, spec.state),
        check_vma=False,
    )
    return run(*args)


def softmax_on_pages(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    index: Int32[Array, "B T"],
    cache: PagedCache,
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "B T H K"], Float[Array, "N P G S K"], Float[Array, "N P G S K"]]:
    """Writes keys and values into the rows' pages of layer `layer` and attends over them.

    Args:
      q: Queries [B, T, H, K].
      k: Keys [B, T, G, K].
      v: Values [B, T, G, K].
      index: Place of each token in its row [B, T]; the row's capacity or more for padding.
      cache: Of the rows.
      layer: Which of the softmax layers this is.

    Returns:
      Output [B, T, H, K] and the pools of keys and values.

    Raises:
      ShardingError: the mesh does not divide the KV heads.
    """
    mesh = active_mesh()
    axis = _split_axis(mesh, q.shape[1], must=False)
    args = (q, k, v, index, cache.keys, cache.values, cache.table, layer)
    body = partial(_write_pages_and_attend, axis=axis)
    if mesh is None:
        return body(*args)
    spec = _PoolSpecs(mesh, axis, heads=q.shape[2], kv_heads=k.shape[2])
    run = jax.shard_map(
        body,
        in_specs=(*(spec.heads,) * 3, spec.rows, spec.pages, spec.pages, P(), P()),
        out_specs=(spec.heads, spec.pages, spec.pages),
        check_vma=False,
    )
    return run(*args)


def _check_heads(parts: int, heads: dict[str, int]) -> None:
    for name, count in heads.items():
        if count % parts:
            raise ShardingError(
                f"{count} {name} cannot be spread over model={parts}; "
                f"choose a size of `model` that divides {count}"
            )


class _PoolSpecs:
    """Where the arrays of a call on pools lie: rows whole on every device, heads over `model`.

    rows [B, T]; heads [B, T, H or G, K]; state [M, S, H, K, V]; pages [N, P, G, page, K].
    """

    def __init__(self, mesh: AbstractMesh, axis: str | None, **heads: int) -> None:
        _check_heads(mesh.shape["model"], heads)
        self.rows = P(None, axis)
        self.heads = P(None, axis, "model", None)
        self.state = P(None, None, "model", None, None)
        self.pages = P(None, None, "model", None, None)


class _Specs:
    """Where the arrays of one attention call lie, checked against their sizes.

    rows [B, T]; whole_rows [B, T], the sequence on every rank; heads [B, T, H or G, K];
    state [B, H, K, V]; cache [N, B, S, G, K].
    """

    def __init__(
        self, mesh: AbstractMesh, shape: tuple[int, ...], axis: str | None, **heads: int
    ) -> None:
        _check_heads(mesh.shape["model"], heads)
        (batch,) = activation_spec(mesh, shape[:1], ("batch",))
        # An axis that no spec names would be summed over by the gradient, even one of size 1.
        sequence = AXIS if mesh.shape[AXIS] == 1 else axis
        self.rows = P(batch, sequence)
        self.whole_rows = P(batch, None)
        self.heads = P(batch, sequence, "model", None)
        self.state = P(batch, "model", None, None)
        self.cache = P(None, batch, None, "model", None)


def length_multiple(mesh: Mesh | AbstractMesh) -> int:
    """What the length of sequences has to be a multiple of on a mesh."""
    parts = mesh.shape[AXIS]
    # Two blocks a rank, see `_balance`.
    return 2 * parts if parts > 1 else 1


def _split_axis(mesh: AbstractMesh | None, length: int, *, must: bool) -> str | None:
    """The mesh axis that splits sequences of `length`; None where each device has them whole."""
    parts = 1 if mesh is None else mesh.shape[AXIS]
    if mesh is None or parts == 1:
        return None
    multiple = length_multiple(mesh)
    if length % multiple == 0:
        return AXIS
    if must:
        raise ShardingError(
            f"sequences of {length} tokens cannot be split over {AXIS}={parts}: pad them to a "
            f"multiple of {multiple} with segment id 0, or choose another size of `{AXIS}`"
        )
    return None


# Lightning attention.


def _step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    out, after = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], decay, state)
    if segment_ids is not None:
        real = segment_ids[:, 0] != 0
        after = jnp.where(real[:, None, None, None], after, state)
        out = jnp.where(real[:, None, None], out, 0)
    return out[:, None], after


def _local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    state: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    return lightning_attention(q, k, v, decay, segment_ids=segment_ids, initial_state=state)


def _step_on_pool(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    _segment_ids: jax.Array | None,
    state: jax.Array,
    slots: jax.Array,
    layer: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    pool, entries = as_one_pool(state, slots, layer)
    out, pool = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], decay, pool, slots=entries)
    return out[:, None], pool.reshape(state.shape)


def _extend_pool(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    state: jax.Array,
    slots: jax.Array,
    layer: jax.Array,
    *,
    axis: str | None,
) -> tuple[jax.Array, jax.Array]:
    # Behind the barrier XLA would read it again from a pool that it copies for that.
    before, state = jax.lax.optimization_barrier((state[layer, jnp.maximum(slots, 0)], state))
    body = _local if axis is None else partial(lasp, axis=axis)
    out, after = body(q, k, v, decay, segment_ids, before)
    into = jnp.where(slots >= 0, slots, state.shape[1])  # past the end: dropped
    return out, state.at[layer, into].set(after, mode="drop")


def lasp(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    state: jax.Array | None,
    *,
    axis: str,
) -> tuple[jax.Array, jax.Array]:
    """Lightning attention of one stretch of rows that are split over `axis` of a `shard_map`.

    The state L_i that stretch i adds is gathered from all ranks; what enters stretch r is

        E_r = Σ_{i<r} exp(-s · tokens of i+1..r-1) L_i

    over the stretches that end in the segment that r begins in. Then the op runs on E_r.

    The states are had by one matmul of k and v before the op. The other order, the op from zeros
    first and then out += decayed q E_r, moves more bytes (q and out read, out written, against k
    and v read), and rounds out twice.

    Args:
      q: [B, T, H, K], T tokens of this rank.
      k: [B, T, H, K].
      v: [B, T, H, V].
      decay: [H].
      segment_ids: [B, T], 0 is padding; None where all tokens are real and of one segment.
      state: [B, H, K, V] before the first token of the whole row; None for zeros.
      axis: Mesh axis of the sequence.

    Returns:
      Output [B, T, H, V] and the state after the last real token of the whole row.

    Source: MiniMax-01 (arXiv 2501.08313), section 3.2.2 (LASP+); LASP-2 (arXiv 2502.07563).
    """
    states = jax.lax.all_gather(_stretch_state(k, v, decay, segment_ids), axis)  # [n, B, H, K, V]
    spans = _read_spans(segment_ids, q.shape[1], axis)
    rank = jax.lax.axis_index(axis)
    entering = _fold(states, state, decay, spans, rank, spans.start[rank])
    out, _ = lightning_attention(q, k, v, decay, segment_ids=segment_ids, initial_state=entering)
    ranks = jax.lax.axis_size(axis)
    return out, _fold(states, state, decay, spans, jnp.int32(ranks), spans.end[-1])


class _Spans(NamedTuple):
    """Of the stretch of each rank [n, B]: tally of real tokens up to its end; runs (segments
    counted along the row) in which it starts and ends. B may be 1 where all rows agree.
    """

    tally: jax.Array
    start: jax.Array
    end: jax.Array


def _read_spans(segment_ids: jax.Array | None, length: int, axis: str) -> _Spans:
    ranks = jax.lax.axis_size(axis)
    if segment_ids is None:
        zeros = jnp.zeros((ranks, 1), jnp.int32)
        return _Spans(length * (1 + jnp.arange(ranks, dtype=jnp.int32)[:, None]), zeros, zeros)
    real, tally, run = read_clock(segment_ids)
    last = length - 1 - jnp.argmax(real[:, ::-1], axis=1)
    ends = jnp.stack([jnp.argmax(real, axis=1), last], axis=1)
    first_id, last_id = jnp.take_along_axis(segment_ids, ends, axis=1).T  # 0 where none is real
    mine = jnp.stack([tally[:, -1], run[:, -1], first_id, last_id])
    count, cuts, first_id, last_id = jax.lax.all_gather(mine, axis, axis=1)  # each [n, B]
    # The ids at the ends of all stretches, as one short row, show every cut but those within a
    # stretch that ends in the id it began with.
    borders = jnp.stack([first_id, last_id], axis=1).reshape(2 * ranks, -1)
    seen = read_clock(borders.T).run.T.reshape(ranks, 2, -1)
    unseen = cuts - (first_id != last_id).astype(jnp.int32)
    unseen_so_far = jnp.cumsum(unseen, axis=0, dtype=jnp.int32)
    return _Spans(
        tally=jnp.cumsum(count, axis=0, dtype=jnp.int32),
        start=seen[:, 0] + unseen_so_far - unseen,
        end=seen[:, 1] + unseen_so_far,
    )


def _stretch_state(
    k: jax.Array, v: jax.Array, decay: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """The state [B, H, K, V] that this stretch leaves behind, were it entered with zeros."""
    length = k.shape[1]
    if segment_ids is None:
        steps = jnp.arange(length - 1, -1, -1, dtype=jnp.int32)[None]
        counts = jnp.ones((1, length), bool)
    else:
        real, tally, run = read_clock(segment_ids)
        steps, counts = tally[:, -1:] - tally, real & (run == run[:, -1:])
    weight = _weight(decay, steps, counts)  # [B, T, H]
    return einsum32("bthk,bthv->bhkv", k * weight[..., None].astype(k.dtype), v, v.dtype)


def _fold(
    states: jax.Array,
    first: jax.Array | None,
    decay: jax.Array,
    spans: _Spans,
    rank: jax.Array,
    run: jax.Array,
) -> jax.Array:
    """The state that enters run `run` [B] at the start of stretch `rank`, [B, H, K, V]."""
    index = jnp.arange(spans.tally.shape[0], dtype=jnp.int32)[:, None]
    before = jnp.where(rank > 0, spans.tally[jnp.maximum(rank - 1, 0)], 0)  # [B]
    # Later stretches are masked; clamped, their exponent stays <= 0.
    steps = jnp.maximum(before[None] - spans.tally, 0)
    weight = _weight(decay, steps, (index < rank) & (spans.end == run[None]))  # [n, B, H]
    total = jnp.sum(weight[..., None, None] * states, axis=0)
    if first is None:
        return total
    return total + _weight(decay, before, run == 0)[..., None, None] * first


def _weight(decay: jax.Array, steps: jax.Array, counts: jax.Array) -> jax.Array:
    """exp(-s · steps) where it counts, else 0: [..., H] of steps [...] >= 0."""
    rate = decay.reshape((1,) * steps.ndim + decay.shape)
    return jnp.where(counts[..., None], jnp.exp(-rate * steps[..., None].astype(decay.dtype)), 0)


# Softmax attention.


def _write_and_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    *,
    axis: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    k, v = _gather_sequence((k, v), axis)
    row = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    keys = keys.at[layer, row, slots].set(k.astype(keys.dtype), mode="drop")
    values = values.at[layer, row, slots].set(v.astype(values.dtype), mode="drop")
    index = jnp.where(slots < keys.shape[2], slots, -1)
    own_keys, own_values = (x[layer].astype(q.dtype) for x in (keys, values))
    return _attend(q, own_keys, own_values, index, None, axis=axis), keys, values


def _write_pages_and_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    layer: jax.Array,
    *,
    axis: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    k, v, all_index = _gather_sequence((k, v, index), axis)
    keys = write_pages(k, all_index, keys, table, layer)
    values = write_pages(v, all_index, values, table, layer)
    return paged_attention(q, keys, values, table, index, layer), keys, values


def _gather_sequence(x: tuple[jax.Array, ...], axis: str | None) -> tuple[jax.Array, ...]:
    """Whole sequences [B, T, *] of stretches [B, T / n, *]."""
    if axis is None:
        return x
    return tuple(jax.lax.all_gather(each, axis, axis=1, tiled=True) for each in x)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: jax.Array,
    segment_ids: jax.Array | None,
    *,
    axis: str | None,
) -> jax.Array:
    """Attention of this rank's queries to all keys. index and segment_ids are of whole rows."""
    if axis is None:
        return softmax_attention(
            q, k, v, index, query_segments=segment_ids, key_segments=segment_ids
        )
    own = partial(_balanced_part, axis=axis)
    out = softmax_attention(
        _balance(q, axis),
        k,
        v,
        own(index),
        query_segments=None if segment_ids is None else own(segment_ids),
        key_segments=segment_ids,
    )
    return _unbalance(out, axis)


# Under a causal mask the last stretch costs 2n - 1 times what the first one does. So the sequence
# is cut into 2n blocks, of which rank r holds 2r and 2r + 1 and attends for r and 2n - 1 - r:
# an early block and a late one, the same work for all.


def _routes(axis: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From which rank to which each rank's first block goes, and its second."""
    ranks = jax.lax.axis_size(axis)
    first = [(r, min(2 * r, 2 * ranks - 1 - 2 * r)) for r in range(ranks)]
    second = [(r, min(2 * r + 1, 2 * ranks - 2 - 2 * r)) for r in range(ranks)]
    return first, second


def _balance(x: jax.Array, axis: str) -> jax.Array:
    """This rank's stretch [B, T / n, *] for the two blocks that it attends for."""
    halves = jnp.split(x, 2, axis=1)
    moved = [jax.lax.ppermute(h, axis, r) for h, r in zip(halves, _routes(axis), strict=True)]
    return jnp.concatenate(moved, axis=1)


def _unbalance(x: jax.Array, axis: str) -> jax.Array:
    """The inverse of `_balance`."""
    halves = jnp.split(x, 2, axis=1)
    back = [[(there, here) for here, there in route] for route in _routes(axis)]
    moved = [jax.lax.ppermute(h, axis, r) for h, r in zip(halves, back, strict=True)]
    return jnp.concatenate(moved, axis=1)


def _balanced_part(row: jax.Array, axis: str) -> jax.Array:
    """What `_balance` brings to this rank, cut from whole rows [B, T]."""
    ranks, rank = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    size = row.shape[1] // (2 * ranks)
    even = jnp.where(rank % 2 == 0, rank, 2 * ranks - 1 - rank)
    blocks = (even, 2 * ranks - 1 - even)  # First blocks of ranks have even numbers.
    cut = [jax.lax.dynamic_slice_in_dim(row, b * size, size, axis=1) for b in blocks]
    return jnp.concatenate(cut, axis=1)
