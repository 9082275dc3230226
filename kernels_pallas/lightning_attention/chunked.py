"""Lightning attention in chunks, in plain XLA: any device, any length, constant memory in T.

For a chunk of C tokens entered with state S (weights W of `clock.py`):

    A = (q kᵀ) ∘ W.within            o  = A v + W.entering ∘ (q S)
                                     S' = W.keep S + (W.leaving ∘ k)ᵀ v

and backwards, with D the cotangent of S' and dA = (do vᵀ) ∘ W.within:

    dq = dA k  + W.entering ∘ (do Sᵀ)
    dk = dAᵀ q + W.leaving ∘ (v Dᵀ)       D' = W.keep D + (W.entering ∘ q)ᵀ do
    dv = Aᵀ do + W.leaving ∘ (k D)

dq needs the states in order and dk, dv need D in reverse order, so the backward runs two scans
and stores no state per chunk: residuals are the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.lightning_attention.clock import (
    Clock,
    Weights,
    chunk_weights,
    read_clock,
    unpacked_weights,
)
from kernels_pallas.lightning_attention.vjp import Arguments, Cotangents, keep_inputs, of_inputs
from kernels_pallas.numerics import einsum32

CHUNK = 64

type _Arrays = tuple[jax.Array, ...]
type _ClockChunk = tuple[Clock, jax.Array, jax.Array]
type _Body = Callable[[jax.Array, Weights, _Arrays], tuple[jax.Array, _Arrays]]


@jax.custom_vjp
def lightning_attention_chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    initial_state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`lightning_attention` by chunks. Shapes as in the public function."""

    def body(state: jax.Array, w: Weights, x: _Arrays) -> tuple[jax.Array, _Arrays]:
        q, k, v = x
        dot = partial(einsum32, dtype=v.dtype)
        scores = dot("bhik,bhjk->bhij", q, k) * w.within
        out = dot("bhij,bhjv->bhiv", scores, v)
        out += w.entering[..., None] * dot("bhik,bhkv->bhiv", q, state)
        state = w.keep[..., None, None] * state
        state += dot("bhjk,bhjv->bhkv", k * w.leaving[..., None].astype(k.dtype), v)
        return state, (out.astype(v.dtype),)

    state, (out,) = _over_chunks(body, initial_state, (q, k, v), decay, segment_ids)
    return out, state


def _backward(args: Arguments, cotangents: tuple[jax.Array, jax.Array]) -> Cotangents:
    q, k, v, decay, segment_ids, initial_state = args
    d_out, d_state = cotangents
    dot = partial(einsum32, dtype=v.dtype)

    def queries(state: jax.Array, w: Weights, x: _Arrays) -> tuple[jax.Array, _Arrays]:
        k, v, d_out = x
        d_scores = dot("bhiv,bhjv->bhij", d_out, v) * w.within
        d_q = dot("bhij,bhjk->bhik", d_scores, k)
        d_q += w.entering[..., None] * dot("bhiv,bhkv->bhik", d_out, state)
        state = w.keep[..., None, None] * state
        state += dot("bhjk,bhjv->bhkv", k * w.leaving[..., None].astype(k.dtype), v)
        return state, (d_q.astype(k.dtype),)

    def keys(d_state: jax.Array, w: Weights, x: _Arrays) -> tuple[jax.Array, _Arrays]:
        q, k, v, d_out = x
        leaving = w.leaving[..., None]
        scores = dot("bhik,bhjk->bhij", q, k) * w.within
        d_scores = dot("bhiv,bhjv->bhij", d_out, v) * w.within
        d_k = _transposed_product(d_scores, q)
        d_k += leaving * dot("bhjv,bhkv->bhjk", v, d_state)
        d_v = _transposed_product(scores, d_out.astype(v.dtype))
        d_v += leaving * dot("bhjk,bhkv->bhjv", k, d_state)
        d_state = w.keep[..., None, None] * d_state
        d_state += dot("bhik,bhiv->bhkv", q * w.entering[..., None].astype(q.dtype), d_out)
        return d_state, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    _, (d_q,) = _over_chunks(queries, initial_state, (k, v, d_out), decay, segment_ids)
    d_initial, (d_k, d_v) = _over_chunks(
        keys, d_state, (q, k, v, d_out), decay, segment_ids, reverse=True
    )
    return of_inputs(args, d_q, d_k, d_v, d_initial)


lightning_attention_chunked.defvjp(keep_inputs(lightning_attention_chunked), _backward)


def _transposed_product(a: jax.Array, x: jax.Array) -> jax.Array:
    """aᵀ x [B, H, J, K] of a [B, H, I, J] float32 and x [B, H, I, K], in x.dtype, to float32."""
    if dispatch.target(x).platform != "cpu":
        return einsum32("bhij,bhik->bhjk", a, x, x.dtype)
    # As (xᵀ a)ᵀ, with x laid out anew, which is the smaller of the two: XLA's products on CPUs
    # that sum over the rows of both take twice as long.
    turned = jax.lax.optimization_barrier(x.swapaxes(2, 3))
    out = jax.lax.optimization_barrier(einsum32("bhki,bhij->bhkj", turned, a, x.dtype))
    return out.swapaxes(2, 3)


def _over_chunks(
    body: _Body,
    carry: jax.Array,
    arrays: _Arrays,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, _Arrays]:
    """Runs `body(carry, weights, arrays of one chunk [B, H, C, *])` over the sequence in order.

    The sequence is cut into whole chunks, which are scanned, and one shorter tail.
    """
    length = arrays[0].shape[1]
    clock = None if segment_ids is None else read_clock(segment_ids)
    whole = length // CHUNK * CHUNK
    parts = [part for part in ((0, whole, CHUNK), (whole, length, length - whole)) if part[2]]
    parts = [part for part in parts if part[1] > part[0]]
    outs = []
    for start, stop, size in reversed(parts) if reverse else parts:
        chunks = tuple(_split(a[:, start:stop], size) for a in arrays)
        if clock is None:
            fixed = partial(_with_weights, body, unpacked_weights(decay, size))
            carry, out = jax.lax.scan(fixed, carry, chunks, reverse=reverse)
        else:
            packed = _clock_chunks(clock, start, stop, size)
            each = partial(_with_clock, body, decay)
            carry, out = jax.lax.scan(each, carry, (packed, chunks), reverse=reverse)
        outs.append(tuple(_join(o) for o in out))
    if reverse:
        outs.reverse()
    joined = [
        pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, 1)
        for pieces in zip(*outs, strict=True)
    ]
    return carry, tuple(joined)


def _with_weights(
    body: _Body, w: Weights, carry: jax.Array, x: _Arrays
) -> tuple[jax.Array, _Arrays]:
    return body(carry, w, x)


def _with_clock(
    body: _Body, decay: jax.Array, carry: jax.Array, x: tuple[_ClockChunk, _Arrays]
) -> tuple[jax.Array, _Arrays]:
    (clock, tally_before, run_before), chunks = x
    return body(carry, chunk_weights(decay, clock, tally_before, run_before), chunks)


def _split(x: jax.Array, size: int) -> jax.Array:
    """[B, T, H, *] to chunks [T/C, B, H, C, *]."""
    batch, length, heads, dim = x.shape
    return x.reshape(batch, length // size, size, heads, dim).transpose(1, 0, 3, 2, 4)


def _join(x: jax.Array) -> jax.Array:
    """Chunks [N, B, H, C, *] to [B, N C, H, *]."""
    chunks, batch, heads, size, dim = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, chunks * size, heads, dim)


def _clock_chunks(clock: Clock, start: int, stop: int, size: int) -> _ClockChunk:
    """The clock of [start, stop) in chunks [N, B, C], with what stood before each chunk [N, B]."""

    def chunks(x: jax.Array) -> jax.Array:
        return x[:, start:stop].reshape(x.shape[0], -1, size).swapaxes(0, 1)

    def before(x: jax.Array) -> jax.Array:
        shifted = jnp.pad(x, ((0, 0), (1, 0)))
        return shifted[:, start:stop:size].T

    return Clock(*map(chunks, clock)), before(clock.tally), before(clock.run)
