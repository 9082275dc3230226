"""Causal grouped-query softmax attention over segments, dense or in blocks, in plain XLA.

Key j is visible to query i where j <= index_i and both are real tokens of one segment; a query
that sees no key gets zeros. The blocked form never holds more than one block of scores and skips
the blocks above the diagonal, forward and backward; its backward recomputes the scores. On
CPUs, where passes over the scores are what takes time, inference in float32 does without a running
maximum where the lengths of queries and keys bound the scores.

R = H / G query heads share a key head: queries [B, G, R, T, K], keys [B, G, S, K].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from kernels_pallas.numerics import (
    MASKED,
    OnlineSoftmax,
    begin_softmax,
    einsum32,
    extend_softmax,
    masked_exp,
    product,
)

# Up to this many scores a head and row the dense form is faster and its memory harmless.
DENSE_SCORES = 1 << 19
BLOCK = 512
# Powers 2^x, |x| <= REACH, are summed as they are: a million keys with values up to 10^12 stay
# below float32's largest number, and the least weight is far above its smallest.
REACH = 64


class Visibility(NamedTuple):
    """Who sees whom: place [B, T] of each query among the keys (-1 for padding: sees nothing),
    and segments of queries [B, T] and keys [B, S], both None where all are of one segment.
    """

    place: jax.Array
    query_segments: jax.Array | None
    key_segments: jax.Array | None


def softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    index: Int32[Array, "B T"],
    *,
    query_segments: Int32[Array, "B T"] | None = None,
    key_segments: Int32[Array, "B S"] | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(q kᵀ / sqrt(K)) v, causal, with a float32 softmax; see the module for visibility.

    Args:
      q: Queries [B, T, H, K].
      k: Keys [B, S, G, K], G dividing H.
      v: Values [B, S, G, K].
      index: Place of each query among the keys [B, T]; -1 for padding.
      query_segments: [B, T]; None where all tokens are of one segment.
      key_segments: [B, S].

    Returns:
      [B, T, H, K] in v.dtype.
    """
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, length, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
    sees = Visibility(index, query_segments, key_segments)
    attend = _dense if length * k.shape[1] <= DENSE_SCORES else _blocked
    scale = dim**-0.5
    if q.dtype == jnp.float32 or math.log2(scale).is_integer():
        # Where it costs q no rounding, one pass over q instead of one over all scores.
        grouped, scale = grouped * jnp.asarray(scale, q.dtype), 1.0
    out = attend(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), sees, scale)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(v.dtype)


def _visible(sees: Visibility, first_key: jax.Array | int, keys: int) -> jax.Array:
    """Mask [B, T, keys] of `keys` keys, of which the first stands at `first_key`."""
    key = first_key + jnp.arange(keys, dtype=jnp.int32)
    mask = key[None, None] <= sees.place[:, :, None]
    if sees.query_segments is not None and sees.key_segments is not None:
        mask &= sees.query_segments[:, :, None] == sees.key_segments[:, None]
    return mask


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, sees: Visibility, scale: float) -> jax.Array:
    mask = _visible(sees, 0, k.shape[2])[:, None, None]
    scores = _scaled(einsum32("bgrtk,bgsk->bgrts", q, k, q.dtype), scale)
    scores = jnp.where(mask, scores, MASKED)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - top), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    return einsum32("bgrts,bgsk->bgrtk", weights, v, v.dtype)


# From here on query heads and rows are merged, queries [P, Q, K] and keys [P, S, K] with
# P = B G pairs and Q = R T rows: XLA's dot on CPUs is twice as fast on three axes as on five.


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q: jax.Array, k: jax.Array, v: jax.Array, sees: Visibility, scale: float) -> jax.Array:
    # What is to be differentiated keeps its running maximum: relative to it, the weights that the
    # backward recomputes are the forward's.
    attend = _direct_on_cpu if q.dtype == v.dtype == jnp.float32 else _running
    return _sweep(q, k, v, sees, scale, attend)[0]


type _Residuals = tuple[jax.Array, jax.Array, jax.Array, Visibility, jax.Array, jax.Array]


def _blocked_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, sees: Visibility, scale: float
) -> tuple[jax.Array, _Residuals]:
    out, lse = _sweep(q, k, v, sees, scale, _running)
    out, lse = product(out), product(lse)
    return out, (q, k, v, sees, out, lse)


def _sweep(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sees: Visibility,
    scale: float,
    attend: Callable[[_KeyBlocks, jax.Array, Visibility, float], OnlineSoftmax],
) -> tuple[jax.Array, jax.Array]:
    """Output [B, G, R, T, K] and log-sum-exp [N, P, Q], a block of queries after the other."""
    keys = _KeyBlocks(k, v, sees, q.shape[2])

    def block(_: None, x: tuple[jax.Array, Visibility]) -> tuple[None, tuple[jax.Array, ...]]:
        top, total, acc = attend(keys, *x, scale)
        total = jnp.where(total > 0, total, 1)
        return None, (acc / total[..., None], top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(block, None, (_split_queries(q), _split_visibility(sees)))
    return _join_queries(out, q.shape), lse


def _running(keys: _KeyBlocks, q: jax.Array, sees: Visibility, scale: float) -> OnlineSoftmax:
    """Online softmax of a block of queries [P, Q, K], whatever their scores."""

    def step(j: jax.Array, carry: OnlineSoftmax, masked: bool) -> OnlineSoftmax:
        k_j, v_j, mask = keys.read(j, sees, masked)
        weigh = partial(einsum32, "pqs,psk->pqk", b=v_j, dtype=v_j.dtype)
        return extend_softmax(carry, _scores(q, k_j, scale), mask, weigh)

    return keys.loop(sees, step, begin_softmax(q.shape))


def _direct_on_cpu(keys: _KeyBlocks, q: jax.Array, sees: Visibility, scale: float) -> OnlineSoftmax:
    """`_direct` on a CPU where the lengths of queries and keys allow it, else `_running`."""
    running, direct = (partial(form, keys, q, sees, scale) for form in (_running, _direct))

    def longest(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.max(jnp.sum(jnp.square(x), -1)))

    def either() -> OnlineSoftmax:
        reach = longest(q) * longest(keys.k) * (scale * math.log2(math.e))
        return jax.lax.cond(reach <= REACH, direct, running)

    return jax.lax.platform_dependent(cpu=either, default=running)


def _direct(keys: _KeyBlocks, q: jax.Array, sees: Visibility, scale: float) -> OnlineSoftmax:
    """The same relative to a score of 0, for |q| |k| within REACH, hence the scores too."""
    powers = q * (scale * math.log2(math.e))

    def step(j: jax.Array, carry: OnlineSoftmax, masked: bool) -> OnlineSoftmax:
        top, total, acc = carry
        k_j, v_j, mask = keys.read(j, sees, masked)
        weights = _exp2(_scores(powers, k_j, 1.0))
        if mask is not None:
            weights = jnp.where(mask, weights, 0)
        acc += einsum32("pqs,psk->pqk", weights, v_j, v_j.dtype)
        return top, total + weights.sum(-1), acc

    top, total, acc = begin_softmax(q.shape)
    return keys.loop(sees, step, (jnp.zeros_like(top), total, acc))


# 2^f for |f| <= 1/2, to 2e-8 of it: the coefficients of Cephes' exp2f, highest power first.
_POLYNOMIAL = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
# Added to a small float32, rounds it to the integer that then fills its lowest bits.
_ROUND = 1.5 * 2**23


def _exp2(x: jax.Array) -> jax.Array:
    """2^x, float32, |x| <= 126, to 2 ulp; XLA's own takes longer for its care about larger ones."""
    shifted = x + _ROUND
    fraction = x - (shifted - _ROUND)
    power = jnp.full_like(x, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        power = power * fraction + coefficient
    exponent = jax.lax.bitcast_convert_type(shifted, jnp.int32) << 23
    bits = jax.lax.bitcast_convert_type(power, jnp.int32) + exponent
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _blocked_backward(
    scale: float, residuals: _Residuals, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, Visibility]:
    q, k, v, sees, out, lse = residuals
    keys = _KeyBlocks(k, v, sees, q.shape[2])
    # Σ_k do_ik o_ik is what the softmax's normaliser takes back from every score of row i.
    correction = jnp.sum(d_out * out, axis=-1, keepdims=True)

    def block(
        carry: tuple[jax.Array, jax.Array],
        x: tuple[jax.Array, Visibility, jax.Array, jax.Array, jax.Array],
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q_i, sees_i, d_out_i, lse_i, correction_i = x

        def step(j: jax.Array, carry: _Arrays, masked: bool) -> _Arrays:
            d_q, d_k, d_v = carry
            k_j, v_j, mask = keys.read(j, sees_i, masked)
            weights = masked_exp(_scores(q_i, k_j, scale), lse_i, mask)
            d_weights = einsum32("pqk,psk->pqs", d_out_i, v_j, v.dtype)
            d_scores = _scaled(weights * (d_weights - correction_i), scale)
            d_q += einsum32("pqs,psk->pqk", d_scores, k_j, q.dtype)
            d_k = _add_block(d_k, einsum32("pqs,pqk->psk", d_scores, q_i, q.dtype), j)
            d_v = _add_block(d_v, einsum32("pqs,pqk->psk", weights, d_out_i, v.dtype), j)
            return d_q, d_k, d_v

        start = (jnp.zeros(q_i.shape, jnp.float32), *carry)
        d_q, d_k, d_v = keys.loop(sees_i, step, start)
        return (d_k, d_v), d_q

    zeros = jnp.zeros(keys.k.shape, jnp.float32)
    q_blocks, d_out_blocks, correction_blocks = map(_split_queries, (q, d_out, correction))
    xs = (q_blocks, _split_visibility(sees), d_out_blocks, lse, correction_blocks)
    (d_k, d_v), d_q = jax.lax.scan(block, (zeros, zeros), xs)
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), sees)
    return (
        _join_queries(d_q, q.shape).astype(q.dtype),
        d_k[:, : k.shape[2]].reshape(k.shape).astype(k.dtype),
        d_v[:, : v.shape[2]].reshape(v.shape).astype(v.dtype),
        no_gradient,
    )


_blocked.defvjp(_blocked_forward, _blocked_backward)

type _Arrays = tuple[jax.Array, jax.Array, jax.Array]


def _scores(q: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    return _scaled(einsum32("pqk,psk->pqs", q, k, q.dtype), scale)


def _scaled(scores: jax.Array, scale: float) -> jax.Array:
    return scores if scale == 1 else scores * scale


def _add_block(total: jax.Array, part: jax.Array, j: jax.Array) -> jax.Array:
    old = jax.lax.dynamic_slice_in_dim(total, j * BLOCK, BLOCK, 1)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, j * BLOCK, 1)


def _split_queries(x: jax.Array) -> jax.Array:
    """[B, G, R, T, K] to blocks [N, P, Q, K] with Q = R · BLOCK, padded with zeros."""
    batch, groups, repeats, length, dim = x.shape
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -length % BLOCK), (0, 0)))
    split = padded.reshape(batch, groups, repeats, -1, BLOCK, dim)
    return jnp.moveaxis(split, 3, 0).reshape(-1, batch * groups, repeats * BLOCK, dim)


def _join_queries(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Blocks [N, P, Q, K] to `shape` [B, G, R, T, K]."""
    batch, groups, repeats, length, dim = shape
    split = x.reshape(-1, batch, groups, repeats, BLOCK, dim)
    joined = jnp.moveaxis(split, 0, 3).reshape(batch, groups, repeats, -1, dim)
    return joined[:, :, :, :length]


def _split_visibility(sees: Visibility) -> Visibility:
    """Of each block of queries [N, B, BLOCK]; the queries that pad the last one are blind."""

    def split(x: jax.Array, fill: int) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)), constant_values=fill)
        return padded.reshape(x.shape[0], -1, BLOCK).swapaxes(0, 1)

    segments = sees.query_segments
    return Visibility(split(sees.place, -1), None if segments is None else split(segments, 0), None)


class _KeyBlocks:
    """Keys, values and segments padded to whole blocks and read one block at a time."""

    def __init__(self, k: jax.Array, v: jax.Array, sees: Visibility, repeats: int) -> None:
        self.groups, self.repeats = k.shape[1], repeats
        pad = -k.shape[2] % BLOCK

        def merge(x: jax.Array) -> jax.Array:
            padded = jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0)))
            return padded.reshape(-1, *padded.shape[2:])

        self.k, self.v = merge(k), merge(v)
        segments = sees.key_segments
        self.segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, pad)))

    def loop(
        self,
        sees: Visibility,
        step: Callable[[jax.Array, _Arrays, bool], _Arrays],
        carry: _Arrays,
    ) -> _Arrays:
        """`step(j, carry, masked)` over the blocks that a block of queries sees."""
        stop = (jnp.max(sees.place) + BLOCK) // BLOCK
        whole = jnp.zeros((), jnp.int32)
        if self.segments is None:
            # Blocks that every query sees whole need no mask.
            whole = (jnp.min(sees.place) + 1) // BLOCK
            carry = jax.lax.fori_loop(0, whole, lambda j, c: step(j, c, False), carry)
        return jax.lax.fori_loop(whole, stop, lambda j, c: step(j, c, True), carry)

    def read(
        self, j: jax.Array, sees: Visibility, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Keys and values [P, BLOCK, K] of block j, and the mask [P, Q, BLOCK]."""

        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, j * BLOCK, BLOCK, 1)

        mask = None
        if masked:
            segments = None if self.segments is None else cut(self.segments)
            mask = _visible(sees._replace(key_segments=segments), j * BLOCK, BLOCK)
            mask = jnp.tile(mask, (1, self.repeats, 1))
            mask = jnp.repeat(mask, self.groups, axis=0)
        return cut(self.k), cut(self.v), mask
