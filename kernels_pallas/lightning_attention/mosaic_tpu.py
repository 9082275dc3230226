"""Lightning attention for TPUs, in Pallas.

The maths is that of `chunked.py`. One sweep over the sequence is one kernel on the grid
(B, H / heads, T / chunk), whose last axis runs in order. q, k, v are read as [B, T, H·K]: a block
is `chunk` tokens of `heads` neighbouring heads, and nothing is transposed in memory. Projections
write that form, so the reshape is free next to one. The states of the block's heads stay in VMEM
from the first chunk to the last; HBM sees each input and each output once and no state between.

Three sweeps: outputs in order; dq in order, recomputing the states; dk and dv in reverse, carrying
the cotangent of the state. Residuals are the inputs alone.

Decay weights. A chunk without padding or restart has the same weights as every other such chunk,
so a sweep computes them once, into VMEM. The other chunks compute their own from their tokens'
segment ids, and read q, k, v through a mask, so that padding and what lies
beyond T may hold anything, NaN included. No exponent is ever positive (`clock.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.lightning_attention.clock import Weights
from kernels_pallas.lightning_attention.vjp import Arguments, Cotangents, keep_inputs, of_inputs
from kernels_pallas.numerics import einsum32

_LANES = 128
# v4 has 16 MiB a core, of which the compiler wants a part for values in flight.
_VMEM_BUDGET = 9 * 2**20
_VMEM_IN_FLIGHT = 6 * 2**20

type _Arrays = tuple[jax.Array, ...]
type _Shaped = jax.Array | jax.ShapeDtypeStruct


class Blocks(NamedTuple):
    """What one grid step works on.

    Attributes:
      chunk: Tokens, a multiple of 64; full speed needs a multiple of 128.
      heads: Heads, a divisor of H.
      backward_chunk: Tokens in the two sweeps of the backward.
      backward_heads: Heads in the two sweeps of the backward.
    """

    chunk: int
    heads: int
    backward_chunk: int
    backward_heads: int


def default_blocks(q: _Shaped, v: _Shaped) -> Blocks:
    """Blocks that fit every TPU's VMEM: up to 256 tokens of up to 8 heads.

    Args:
      q: Queries [B, T, H, K].
      v: Values [B, T, H, V].
    """
    batch, length, total, key_dim = q.shape
    chunk = min(256, _round_up(length, _LANES))
    dims = _widths(key_dim, v.shape[-1])

    def heads(*sweeps: _Sweep) -> int:
        divisors = [n for n in range(1, min(total, 8) + 1) if total % n == 0]
        # v4 and v5p spread the first two axes of the grid over two cores.
        shared = [n for n in divisors if batch * total // n >= 2] or divisors
        fits = [
            n
            for n in shared
            if all(_vmem_bytes(s, dims, chunk, n, v.dtype) <= _VMEM_BUDGET for s in sweeps)
        ]
        return max(fits, default=1)

    return Blocks(chunk, heads(_OUTPUTS), chunk, heads(_QUERIES, _KEYS))


def why_not(q: _Shaped, v: _Shaped, blocks: Blocks | None = None) -> str | None:
    """Why the kernels cannot run q [B, T, H, K] and v [B, T, H, V] with these blocks, or None.

    With the default blocks every shape runs.
    """
    dtypes = sorted({str(q.dtype), str(v.dtype)} - {"bfloat16", "float32"})
    if dtypes:
        return f"it takes bfloat16 and float32, not {', '.join(dtypes)}"
    for name, size in (blocks or default_blocks(q, v))._asdict().items():
        if name.endswith("chunk") and (size < 64 or size % 64):
            return f"{name} = {size} is not a multiple of 64"
        if name.endswith("heads") and (size < 1 or q.shape[2] % size):
            return f"{name} = {size} does not divide the {q.shape[2]} heads"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def lightning_attention_mosaic_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    initial_state: jax.Array,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`lightning_attention` on a TPU. Shapes as in the public function.

    Args:
      q: [B, T, H, K].
      k: [B, T, H, K].
      v: [B, T, H, V].
      decay: [H] float32.
      segment_ids: [B, T] int32, or None.
      initial_state: [B, H, K, V] float32.
      blocks: None for `default_blocks`.

    Returns:
      out [B, T, H, V] and the state [B, H, K, V].

    Raises:
      ValueError: `why_not` says that these blocks do not fit the arrays.
    """
    chunk, heads, *_ = _checked(blocks, q, v)
    state, (out,) = _run(_OUTPUTS, initial_state, (q, k, v), decay, segment_ids, (v,), chunk, heads)
    return out, state


def _backward(
    blocks: Blocks | None, args: Arguments, cotangents: tuple[jax.Array, jax.Array]
) -> Cotangents:
    q, k, v, decay, segment_ids, initial_state = args
    d_out, d_state = cotangents
    *_, chunk, heads = _checked(blocks, q, v)
    _, (d_q,) = _run(_QUERIES, initial_state, (k, v, d_out), decay, segment_ids, (q,), chunk, heads)
    d_initial, (d_k, d_v) = _run(
        _KEYS, d_state, (q, k, v, d_out), decay, segment_ids, (k, v), chunk, heads
    )
    return of_inputs(args, d_q, d_k, d_v, d_initial)


lightning_attention_mosaic_tpu.defvjp(keep_inputs(lightning_attention_mosaic_tpu), _backward)


def _checked(blocks: Blocks | None, q: jax.Array, v: jax.Array) -> Blocks:
    blocks = blocks or default_blocks(q, v)
    if reason := why_not(q, v, blocks):
        raise ValueError(f"lightning_attention: mosaic_tpu cannot run: {reason}")
    return blocks


# What one sweep does to one chunk of one head: state [K, V], arrays [C, K] or [C, V].


class _Sweep(NamedTuple):
    """One pass over the sequence.

    inputs and outputs name the width of each array, "K" or "V". A reverse sweep works on
    transposed scores [key, query], which spares it the transposes of its products. products counts
    those of a chunk: with C·C·(K + V), and with C·K·V multiply-adds.
    """

    name: str
    body: Callable[[jax.Array, Weights, _Arrays], tuple[jax.Array, _Arrays]]
    inputs: str
    outputs: str
    products: tuple[int, int]
    reverse: bool = False


def _outputs(state: jax.Array, w: Weights, x: _Arrays) -> tuple[jax.Array, _Arrays]:
    q, k, v = x
    dot = partial(einsum32, dtype=v.dtype)
    scores = dot("ik,jk->ij", q, k) * w.within
    out = dot("ij,jv->iv", scores, v) + _scale(w.entering, dot("ik,kv->iv", q, state))
    return _absorb(state, w.keep, _scale(w.leaving, k), v), (out,)


def _queries(state: jax.Array, w: Weights, x: _Arrays) -> tuple[jax.Array, _Arrays]:
    k, v, d_out = x
    dot = partial(einsum32, dtype=v.dtype)
    d_scores = dot("iv,jv->ij", d_out, v) * w.within
    d_q = dot("ij,jk->ik", d_scores, k) + _scale(w.entering, dot("iv,kv->ik", d_out, state))
    return _absorb(state, w.keep, _scale(w.leaving, k), v), (d_q,)


def _keys(d_state: jax.Array, w: Weights, x: _Arrays) -> tuple[jax.Array, _Arrays]:
    q, k, v, d_out = x
    dot = partial(einsum32, dtype=v.dtype)
    scores = dot("jk,ik->ji", k, q) * w.within
    d_scores = dot("jv,iv->ji", v, d_out) * w.within
    d_k = dot("ji,ik->jk", d_scores, q) + _scale(w.leaving, dot("jv,kv->jk", v, d_state))
    d_v = dot("ji,iv->jv", scores, d_out) + _scale(w.leaving, dot("jk,kv->jv", k, d_state))
    return _absorb(d_state, w.keep, _scale(w.entering, q), d_out), (d_k, d_v)


def _scale(weight: jax.Array, x: jax.Array) -> jax.Array:
    return weight[:, : x.shape[1]] * x.astype(jnp.float32)


def _absorb(state: jax.Array, keep: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return _scale(keep, state) + einsum32("ck,cv->kv", a, b, dtype=b.dtype)


_OUTPUTS = _Sweep("lightning_attention", _outputs, "KKV", "V", (1, 2))
_QUERIES = _Sweep("lightning_attention_dq", _queries, "KVV", "K", (1, 2))
_KEYS = _Sweep("lightning_attention_dkdv", _keys, "KKVV", "KV", (2, 3), reverse=True)


# Decay weights in the kernel.


class _Segments(NamedTuple):
    """Packed rows in chunks: ids [B, N, 1, C]; and about [B, N, 1, 2] each chunk: the id of the
    last real token before it, 0 if there is none, and 1 if it is plain: one segment from before
    its first token to its last.
    """

    about: Any
    ids: Any


def _cut_segments(segment_ids: jax.Array, chunk: int) -> _Segments:
    """The scans over tokens are left to the kernel. XLA's, on a TPU, are slow to run and take
    minutes to compile at a million tokens.
    """
    batch, length = segment_ids.shape
    ids = _pad(segment_ids, (batch, _round_up(length, chunk))).reshape(batch, -1, chunk)
    index = jnp.arange(1, chunk + 1, dtype=jnp.int32)[None, None]
    last_real = jnp.max(jnp.where(ids == 0, 0, index), axis=2, keepdims=True)
    last_id = jnp.sum(jnp.where(index == last_real, ids, 0), axis=2)  # [B, N], 0 if all padding
    entering = _last_nonzero_before(last_id)
    first = ids[..., 0]
    plain = (first != 0) & ((entering == 0) | (entering == first))
    plain &= jnp.all(ids == first[..., None], axis=2)
    about = jnp.stack([entering, plain.astype(jnp.int32)], axis=-1)
    return _Segments(about[:, :, None], ids[:, :, None])


def _last_nonzero_before(x: jax.Array) -> jax.Array:
    """Along the second of two axes; 0 if there is none."""
    x = jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
    index = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return jnp.take_along_axis(x, jax.lax.cummax(jnp.where(x == 0, 0, index), axis=1), axis=1)


class _Tokens(NamedTuple):
    """The clock of a chunk's tokens, counted from the last token before it, float32.

    rows [8, C]: tally; run, or -1 for padding; run, or -2 for padding, so that padding matches no
    other; the rest fills the tile. last_tally and last_run [1, 1]: of the last token, padding
    included.
    """

    rows: jax.Array
    last_tally: jax.Array
    last_run: jax.Array


def _read_clock(ids: jax.Array, entering: jax.Array) -> _Tokens:
    """As `clock.read_clock`, for ids [1, C] behind a token of segment `entering`."""
    size = ids.shape[1]
    shape = 8, size
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    distances = [2**i for i in range((size - 1).bit_length())]

    def earlier(x: jax.Array, by: int, fill: jax.Array | int = 0) -> jax.Array:
        return jnp.where(lane < by, fill, pltpu.roll(x, by, 1))

    ids = jnp.broadcast_to(ids, shape)
    latest = ids  # The last id that is not 0; each round looks twice as far back.
    for by in distances:
        latest = jnp.where(latest == 0, earlier(latest, by), latest)
    before = earlier(jnp.where(latest == 0, entering, latest), 1, entering)
    real = jnp.where(ids == 0, 0, 1)
    restart = jnp.where((before == 0) | (before == ids), 0, real)
    counts = jnp.where(row == 0, real, restart)
    for by in distances:
        counts += earlier(counts, by)
    rows = jnp.where((row == 0) | (real == 1), counts, -row)
    last_tally, last_run = (counts[i : i + 1, size - 1 :].astype(jnp.float32) for i in (0, 1))
    return _Tokens(rows.astype(jnp.float32), last_tally, last_run)


def _steps(tokens: _Tokens, width: int, transposed: bool) -> Weights:
    """Steps of decay behind each weight of a chunk, as `Weights` of one head; negative where the
    weight is 0. within [C, C], or its transpose; entering and leaving [C, width]; keep [1, width].
    """
    rows, *last = tokens
    wide = rows.shape[1], width
    columns = rows.T  # [C, 8]
    apart = rows[0:1] - columns[:, 0:1] if transposed else columns[:, 0:1] - rows[0:1]
    tally, run = (jnp.broadcast_to(columns[:, i : i + 1], wide) for i in (0, 2))
    last_tally, last_run = (jnp.broadcast_to(x, (1, width)) for x in last)
    return Weights(
        within=jnp.where(columns[:, 2:3] == rows[1:2], apart, -1),
        entering=jnp.where(run == 0, tally, -1),
        leaving=jnp.where(run == last_run, last_tally - tally, -1),
        keep=jnp.where(last_run == 0, last_tally, -1),
    )


def _plain_steps(size: int, width: int, transposed: bool) -> Weights:
    """`_steps` of a chunk of one segment without padding."""

    def index(shape: tuple[int, int], axis: int) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis).astype(jnp.float32)

    apart = index((size, size), 0) - index((size, size), 1)
    token = index((size, width), 0)
    return Weights(
        within=-apart if transposed else apart,
        entering=token + 1,
        leaving=size - 1 - token,
        keep=jnp.full((1, width), size, jnp.float32),
    )


def _decayed(rate: jax.Array, steps: Weights) -> Weights:
    def weight(n: jax.Array) -> jax.Array:
        return jnp.where(n < 0, 0, jnp.exp(-rate * jnp.maximum(n, 0)))

    return Weights(*map(weight, steps))


# The kernel and its call.


def _kernel(
    decay: Any,  # [H] in SMEM
    segments: _Segments | None,
    arrays: Any,  # [C, heads·K] or [C, heads·V]
    start: Any,  # [heads, K, V]
    outs: Any,
    state: Any,  # [heads, K, V], in VMEM from the first chunk to the last
    plain: Any,  # `Weights` of a plain chunk, each [heads, ...]
    *,
    sweep: _Sweep,
) -> None:
    heads, size, width = plain[1].shape
    first_head = pl.program_id(1) * heads
    rates = [decay[first_head + h] for h in range(heads)]

    @pl.when(pl.program_id(2) == 0)
    def _begin() -> None:
        state[...] = start[...]
        steps = _plain_steps(size, width, sweep.reverse)
        for h, rate in enumerate(rates):
            for ref, weight in zip(plain, _decayed(rate, steps), strict=True):
                ref[h] = weight

    def run(weights: Callable[[int], Weights], read: Callable[[jax.Array], jax.Array]) -> None:
        for h in range(heads):
            x = tuple(read(_head(ref, h, heads)[...]) for ref in arrays)
            state[h], ys = sweep.body(state[h], weights(h), x)
            for ref, y in zip(outs, ys, strict=True):
                _head(ref, h, heads)[...] = y.astype(ref.dtype)

    def run_plain() -> None:
        run(lambda h: Weights(*(ref[h] for ref in plain)), lambda x: x)

    def run_packed(segments: _Segments) -> None:
        tokens = _read_clock(segments.ids[...], segments.about[0, 0])
        steps, run_column = _steps(tokens, width, sweep.reverse), tokens.rows.T[:, 1:2]

        def read(x: jax.Array) -> jax.Array:
            # A select, since NaN times 0 is NaN; in float32, whose masks every TPU has.
            real = jnp.broadcast_to(run_column, x.shape) >= 0
            return jnp.where(real, x.astype(jnp.float32), 0).astype(x.dtype)

        run(lambda h: _decayed(rates[h], steps), read)

    if segments is None:
        run_plain()
    else:
        is_plain = segments.about[0, 1] != 0
        pl.when(is_plain)(run_plain)
        pl.when(~is_plain)(partial(run_packed, segments))


def _head(ref: Any, h: int, heads: int) -> Any:
    dim = ref.shape[1] // heads
    return ref.at[:, h * dim : (h + 1) * dim]


def _run(
    sweep: _Sweep,
    state: jax.Array,
    arrays: _Arrays,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    like: _Arrays,
    chunk: int,
    heads: int,
) -> tuple[jax.Array, _Arrays]:
    """Runs a sweep from `state`; returns the state behind it, and outputs shaped as `like`."""
    batch, length, total, _ = arrays[0].shape
    if segment_ids is None and length % chunk:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    segments = None if segment_ids is None else _cut_segments(segment_ids, chunk)
    rows = max(length, chunk)  # An array no shorter than a block; the last block may stick out.
    dims = _widths(*state.shape[2:])

    def tokens(x: jax.Array, width: str) -> jax.Array:
        return _pad(x, (batch, rows, total, dims[width])).reshape(batch, rows, -1)

    outs, final = _call(
        sweep, dims, (batch, rows, total), chunk, heads, like, segments is not None
    )(
        decay,
        segments,
        tuple(map(tokens, arrays, sweep.inputs)),
        _pad(state, (batch, total, *dims.values())),
    )
    outs = tuple(
        y.reshape(batch, rows, total, -1)[:, :length, :, : x.shape[-1]]
        for y, x in zip(outs, like, strict=True)
    )
    return final[..., : state.shape[2], : state.shape[3]], outs


def _call(
    sweep: _Sweep,
    dims: dict[str, int],
    shape: tuple[int, int, int],
    chunk: int,
    heads: int,
    like: _Arrays,
    packed: bool,
) -> Callable[..., tuple[_Arrays, jax.Array]]:
    """The `pallas_call` of a sweep over arrays [B, T, H·K] and [B, T, H·V]; shape is B, T, H."""
    batch, rows, total = shape
    chunks, width = pl.cdiv(rows, chunk), max(dims.values())

    def at(n: Any) -> Any:
        return chunks - 1 - n if sweep.reverse else n

    def tokens(letter: str) -> pl.BlockSpec:
        return pl.BlockSpec((None, chunk, heads * dims[letter]), lambda b, h, n: (b, at(n), h))

    def of_chunk(*block: int, **kwargs: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *block), lambda b, h, n: (b, at(n), 0, 0), **kwargs)

    segments = _Segments(of_chunk(1, 2, memory_space=pltpu.SMEM), of_chunk(1, chunk))
    states = pl.BlockSpec((None, heads, *dims.values()), lambda b, h, n: (b, h, 0, 0))
    weights = (chunk, chunk), (chunk, width), (chunk, width), (1, width)
    vmem = _vmem_bytes(sweep, dims, chunk, heads, like[0].dtype)
    return pl.pallas_call(
        partial(_kernel, sweep=sweep),
        out_shape=(
            tuple(
                jax.ShapeDtypeStruct((batch, rows, total * dims[letter]), x.dtype)
                for letter, x in zip(sweep.outputs, like, strict=True)
            ),
            jax.ShapeDtypeStruct((batch, total, *dims.values()), jnp.float32),
        ),
        grid=(batch, total // heads, chunks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            segments if packed else None,
            tuple(map(tokens, sweep.inputs)),
            states,
        ],
        out_specs=(tuple(map(tokens, sweep.outputs)), states),
        scratch_shapes=[tuple(pltpu.VMEM((heads, *w), jnp.float32) for w in weights)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_IN_FLIGHT + max(_VMEM_BUDGET, vmem),
        ),
        cost_estimate=_cost(sweep, dims, batch * chunks * total, chunk, like[0].dtype),
        name=sweep.name,
    )


def _cost(
    sweep: _Sweep, dims: dict[str, int], steps: int, chunk: int, dtype: jnp.dtype
) -> pl.CostEstimate:
    """The cost of `steps` chunks of one head."""
    squares, states = sweep.products
    key_dim, value_dim = dims.values()
    width = sum(dims[letter] for letter in sweep.inputs + sweep.outputs)
    return pl.CostEstimate(
        flops=2
        * steps
        * chunk
        * (squares * chunk * sum(dims.values()) + states * key_dim * value_dim),
        bytes_accessed=steps * chunk * width * dtype.itemsize,
        transcendentals=0,  # A plain chunk has none.
    )


def _vmem_bytes(
    sweep: _Sweep, dims: dict[str, int], chunk: int, heads: int, dtype: jnp.dtype
) -> int:
    """What a sweep's blocks, all double-buffered, and its weights take of VMEM."""
    width = sum(dims[letter] for letter in sweep.inputs + sweep.outputs)
    tokens = 2 * chunk * width * jnp.dtype(dtype).itemsize
    states = 2 * 2 * 4 * dims["K"] * dims["V"]
    weights = 4 * (chunk * max(chunk, _LANES) + (2 * chunk + 8) * max(dims.values()))
    return heads * (tokens + states + weights) + 2 * 4 * 8 * chunk


def _widths(key_dim: int, value_dim: int) -> dict[str, int]:
    """K and V in whole lanes."""
    return {"K": _round_up(key_dim, _LANES), "V": _round_up(value_dim, _LANES)}


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pad(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, to - size) for size, to in zip(x.shape, shape, strict=True)])
