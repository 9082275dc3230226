"""The router: which experts a token visits, with what weight, and which visits are dropped."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.numerics import einsum32, product

# Tokens of a decode step, whose kernels take longer to start than to run.
DECODING_TOKENS = 64


class Routing(NamedTuple):
    """Where N tokens go: share [N, k] of each chosen expert, summing to 1 over k; expert [N, k]
    int32, E for a visit that does not take place.
    """

    share: jax.Array
    expert: jax.Array


class RouterStats(NamedTuple):
    """What one layer's router did with its real tokens, and its logits.

    tokens_per_expert [E]: token-slots routed to each expert, the dropped ones included;
    probability_sum [E]: of the softmax over all experts; entropy_sum []: of that softmax, in nats;
    dropped []: token-slots beyond their expert's capacity; logits [B, T, E].
    """

    tokens_per_expert: jax.Array
    probability_sum: jax.Array
    entropy_sum: jax.Array
    dropped: jax.Array
    logits: jax.Array


def route(
    x: jax.Array,
    real: jax.Array,
    kernel: jax.Array,
    top_k: int,
    capacity: int = 0,
    *,
    batch_axes: tuple[str, ...] = (),
    sequence_axes: tuple[str, ...] = (),
) -> tuple[Routing, RouterStats]:
    """Softmax over the experts in float32; the top k, renormalised to sum 1.

    Args:
      x: [B, T, D]; inside `jax.shard_map` this device's part.
      real: Which tokens are no padding [B, T].
      kernel: [D, E] float32.
      top_k: Experts a token visits.
      capacity: Visits that each expert takes of the whole batch, tokens taking their turns row
        after row; 0 for all. With a capacity padding visits nobody.
      batch_axes: Mesh axes over which the rows are spread.
      sequence_axes: Mesh axes over which each row is spread.

    Returns:
      Where the B·T tokens go, and the statistics of this device's part.

    Source: MiniMax-01 (arXiv 2501.08313), section 2.1, eq. 1, token drop and global router.
    """
    tokens, mask = x.reshape(-1, x.shape[-1]), real.reshape(-1)
    logits = product(_logits(tokens, kernel))
    probability = jax.nn.softmax(logits, axis=-1)
    top, expert = _top_k(probability, top_k)
    share = (top / top.sum(-1, keepdims=True)).astype(x.dtype)
    stats = statistics(logits, probability, expert, mask)
    if capacity:
        choice = expert.reshape(*real.shape, top_k)
        place = _place_in_expert(choice, real, logits.shape[-1], batch_axes, sequence_axes)
        kept = (place.reshape(expert.shape) < capacity) & mask[:, None]
        stats = stats._replace(dropped=(mask[:, None] & ~kept).sum().astype(jnp.float32))
        expert = jnp.where(kept, expert, logits.shape[-1])
    return Routing(share, expert), stats._replace(logits=logits.reshape(*real.shape, -1))


def _logits(tokens: jax.Array, kernel: jax.Array) -> jax.Array:
    if tokens.shape[0] > DECODING_TOKENS or dispatch.target().platform != "gpu":
        return einsum32("nd,de->ne", tokens, kernel, jnp.dtype("float32"))
    # A sum that XLA fuses, for a product in float32 that takes a GPU four times as long.
    return (tokens[:, None].astype(jnp.float32) * kernel.T[None]).sum(-1)


def _top_k(probability: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of [N, E], the first of equals first, and their places, int32."""
    count, experts = probability.shape
    if count > DECODING_TOKENS:
        top, expert = jax.lax.top_k(probability, top_k)
        return top, expert.astype(jnp.int32)
    # By counting who is larger: two fused kernels, where a sort is one among several.
    index = jnp.arange(experts, dtype=jnp.int32)
    mine, other = probability[:, :, None], probability[:, None]
    ahead = (other > mine) | ((other == mine) & (index[None, None] < index[None, :, None]))
    rank = ahead.sum(-1, dtype=jnp.int32)  # [N, E]
    chosen = rank[:, None] == jnp.arange(top_k, dtype=jnp.int32)[None, :, None]  # [N, k, E]
    expert = jnp.where(chosen, index[None, None], 0).sum(-1, dtype=jnp.int32)
    return jnp.where(chosen, probability[:, None], 0).sum(-1), expert


def statistics(
    logits: jax.Array, probability: jax.Array, expert: jax.Array, real: jax.Array
) -> RouterStats:
    """The statistics over real [N] of tokens with logits [N, E], that visit experts [N, k]."""
    mask = real.astype(jnp.float32)[:, None]
    visits = jax.nn.one_hot(expert, logits.shape[-1], dtype=jnp.float32).sum(1)  # [N, E]
    entropy = -jnp.sum(probability * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return RouterStats(
        tokens_per_expert=jax.lax.stop_gradient((visits * mask).sum(0)),
        probability_sum=(probability * mask).sum(0),
        entropy_sum=jax.lax.stop_gradient((entropy * mask[:, 0]).sum()),
        dropped=jnp.zeros((), jnp.float32),
        logits=logits,
    )


def expert_capacity(factor: float, tokens: int, top_k: int, experts: int) -> int:
    """Token-slots that one expert takes of a batch: ⌈factor · tokens · k / E⌉."""
    return math.ceil(factor * tokens * top_k / experts)


def _place_in_expert(
    expert: jax.Array,
    real: jax.Array,
    experts: int,
    batch_axes: tuple[str, ...],
    sequence_axes: tuple[str, ...],
) -> jax.Array:
    """How many real tokens before it visit the same expert, for each of expert [B, T, k].

    "Before" is meant in the whole batch, so the same visits are dropped on any mesh.
    """
    visits = jax.nn.one_hot(expert, experts, dtype=jnp.int32).sum(2)
    visits *= real.astype(jnp.int32)[:, :, None]
    before = jnp.cumsum(visits, axis=1) - visits  # [B, T, E]
    before += _visits_before(visits.sum(1), batch_axes, sequence_axes)[:, None]
    return jnp.take_along_axis(before, expert, axis=2)


def _visits_before(
    visits: jax.Array, batch_axes: tuple[str, ...], sequence_axes: tuple[str, ...]
) -> jax.Array:
    """Visits [B, E] of this device's stretch of each row to those before the stretch."""
    before, row = jnp.zeros_like(visits), visits
    if sequence_axes:
        stretches = jax.lax.all_gather(visits, sequence_axes)  # [S, B, E]
        earlier = jnp.arange(stretches.shape[0]) < jax.lax.axis_index(sequence_axes)
        before = jnp.where(earlier[:, None, None], stretches, 0).sum(0)
        row = stretches.sum(0)
    rows = jax.lax.all_gather(row, batch_axes, tiled=True) if batch_axes else row
    start = jax.lax.axis_index(batch_axes) * row.shape[0] if batch_axes else 0
    rows_before = jnp.cumsum(rows, axis=0) - rows
    return before + jax.lax.dynamic_slice_in_dim(rows_before, start, row.shape[0])
