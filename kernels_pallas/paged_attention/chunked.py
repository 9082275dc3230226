"""Softmax attention over keys and values in pages, in plain XLA.

A row's keys are read in spans of whole pages, as many spans as the longest row of the batch needs,
with an online softmax over them: no length is compiled in, memory is one span of each row, and a
row's result does not depend on the length of the others, because a span that it does not see
changes nothing in it, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.numerics import OnlineSoftmax, begin_softmax, einsum32, extend_softmax

# Tokens of a row that are read at a time: what stays in a CPU's caches; elsewhere enough to keep
# the memory busy, and for one query as many as there are, up to SPAN_TOKENS of all rows together.
CPU_SPAN, SPAN, SPAN_TOKENS = 256, 4096, 1 << 18
# Queries of a row whose scores are held at a time.
CPU_QUERY_BLOCK, QUERY_BLOCK = 512, 1024

# Keys and values [B, n, G, page size, K] of the n pages of span j.
type _Read = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
type _Attend = Callable[[jax.Array, jax.Array], jax.Array]


def paged_attention_chunked(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    index: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """`paged_attention` by spans; see the public function."""
    batch, length, heads, dim = q.shape
    groups, size = keys.shape[2:4]
    place = jnp.where(index < table.shape[1] * size, index, -1)
    grouped = q.reshape(batch, length, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
    count = _pages_of_a_span(q, size, table.shape[1])
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % count)))

    def read(j: jax.Array) -> tuple[jax.Array, jax.Array]:
        pages = jax.lax.dynamic_slice_in_dim(table, j * count, count, axis=1)
        k, v = (pool[layer, pages].astype(q.dtype) for pool in (keys, values))
        return k, v

    attend = partial(_attend, read=read, span=count * size, only=count == table.shape[1])
    block = CPU_QUERY_BLOCK if _on_cpu(q) else QUERY_BLOCK
    out = attend(grouped, place) if length <= block else _in_blocks(attend, grouped, place, block)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _pages_of_a_span(q: jax.Array, size: int, most: int) -> int:
    span = SPAN if q.shape[1] > 1 else SPAN_TOKENS // q.shape[0]
    return min(max((CPU_SPAN if _on_cpu(q) else span) // size, 1), most)


def _attend(q: jax.Array, place: jax.Array, *, read: _Read, span: int, only: bool) -> jax.Array:
    """Attention of queries [B, G, R, T, K] at place [B, T], -1 for padding; in float32.

    Spans are looped over, but for an `only` one: a loop whose length is not known has GPUs wait
    for the host.
    """
    scale = q.shape[-1] ** -0.5

    def step(j: jax.Array, carry: OnlineSoftmax) -> OnlineSoftmax:
        k, v = read(j)
        key = j * span + jnp.arange(span, dtype=jnp.int32)
        mask = (key[None, None] <= place[:, :, None])[:, None, None]
        return extend_softmax(
            carry, _scores(q, k) * scale, mask, lambda weights: _weigh(weights, v)
        )

    start = begin_softmax(q.shape)
    if only:
        _, total, acc = step(jnp.zeros((), jnp.int32), start)
    else:
        spans = (jnp.max(place) + span) // span
        _, total, acc = jax.lax.fori_loop(0, spans, step, start)
    return acc / jnp.where(total > 0, total, 1)[..., None]


# For one query each page is multiplied as it lies, with the queries of its row: less work than to
# lay the pages' heads together, which many queries gain by.


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """[B, G, R, T, span] of queries [B, G, R, T, K] and keys [B, n, G, S, K]."""
    if q.shape[3] > 1:
        return einsum32("bgrtk,bgsk->bgrts", q, _together(k), q.dtype)
    pages = jnp.broadcast_to(q[:, None, :, :, 0], (*k.shape[:3], q.shape[2], q.shape[4]))
    scores = einsum32("bngrk,bngsk->bngrs", pages, k, q.dtype)
    return scores.transpose(0, 2, 3, 1, 4).reshape(*q.shape[:4], -1)


def _weigh(weights: jax.Array, v: jax.Array) -> jax.Array:
    """[B, G, R, T, K] of weights [B, G, R, T, span] and values [B, n, G, S, K]."""
    if weights.shape[3] > 1:
        return einsum32("bgrts,bgsk->bgrtk", weights, _together(v), v.dtype)
    batch, groups, repeats, _, _ = weights.shape
    pages = weights.reshape(batch, groups, repeats, v.shape[1], -1).transpose(0, 3, 1, 2, 4)
    return einsum32("bngrs,bngsk->bngrk", pages, v, v.dtype).sum(1)[:, :, :, None]


def _together(x: jax.Array) -> jax.Array:
    """[B, n, G, S, K] to [B, G, n S, K]."""
    batch, pages, groups, size, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch, groups, pages * size, dim)


def _on_cpu(x: jax.Array) -> bool:
    return dispatch.target(x).platform == "cpu"


def _in_blocks(attend: _Attend, q: jax.Array, place: jax.Array, block: int) -> jax.Array:
    """`attend` on one block of queries after another."""
    length = q.shape[3]
    pad = -length % block
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0)))
    place = jnp.pad(place, ((0, 0), (0, pad)), constant_values=-1)
    blocks = q.reshape(*q.shape[:3], -1, block, q.shape[-1])
    places = place.reshape(place.shape[0], -1, block)
    out = jax.lax.map(lambda x: attend(*x), (jnp.moveaxis(blocks, 3, 0), places.swapaxes(0, 1)))
    return jnp.moveaxis(out, 0, 3).reshape(q.shape)[:, :, :, :length]
