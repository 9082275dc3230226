"""Few rows on a GPU, a program each: what XLA makes of a norm and a router is eight kernels that
take longer to start than to run.

On Pallas' Triton route, unlike the other kernels: a row is no tile of Mosaic's, XLA captures these
calls in its command buffers, and the interpreter runs them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.row_norm.reference import Routed

type _Ref = Any

_LANES = 128  # Widths are multiples of it: a row is cut into runs whose length is a power of two.
_TILE = 8192  # Most values of the router's matrix in one tile.
_WARPS = 16
# Values of the router's matrix, which is asked for before the norm is known: 64 a thread.
_HELD = 1 << 15
# Each reads the router's matrix again, from the L2 cache: 34 MB at most.
_ROWS = 256


def why_not_norm(x: jax.Array) -> str | None:
    """Why the kernel cannot take rows of this width; None where it can."""
    if x.shape[1] % _LANES:
        return f"it needs a multiple of {_LANES} values a row; got {x.shape[1]}"
    return None


def why_not_route(x: jax.Array, router: jax.Array) -> str | None:
    """Why the kernel cannot take these rows and this router; None where it can."""
    experts = router.shape[1]
    if experts & (experts - 1) or experts > _TILE // _LANES:
        return f"it needs a power of two of experts up to {_TILE // _LANES}; got {experts}"
    if router.size > _HELD:
        return f"it holds a router's matrix of up to {_HELD} values; got {router.size}"
    if x.shape[0] > _ROWS:
        return f"it takes at most {_ROWS} rows; got {x.shape[0]}"
    return why_not_norm(x)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def row_norm_triton(
    x: jax.Array, scale: jax.Array, eps: float, interpret: bool = False
) -> jax.Array:
    """`row_norm`. Shapes as in the public function."""
    width = x.shape[1]
    run = _run_length(width, _TILE // 8)

    def body(x_ref: _Ref, scale_ref: _Ref, out_ref: _Ref) -> None:
        row = pl.program_id(0)
        parts = [x_ref[row, at].astype(jnp.float32) for at in _runs(width, run)]
        scales = [scale_ref[at] for at in _runs(width, run)]
        normed = _norm(parts, scales, width, eps, x.dtype)
        for at, part in zip(_runs(width, run), normed, strict=True):
            out_ref[row, at] = part

    call = _rows_call(body, "row_norm", x.shape[0], interpret)
    return call(out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x, scale)


@functools.partial(jax.jit, static_argnames=("scales", "eps", "top_k", "row_align", "interpret"))
def add_norm_route_triton(
    x: jax.Array,
    out: jax.Array,
    scale: jax.Array,
    router: jax.Array,
    real: jax.Array,
    *,
    scales: tuple[float, float],
    eps: float,
    top_k: int,
    row_align: int,
    interpret: bool = False,
) -> Routed:
    """`add_norm_route`. Shapes as in the public function."""
    (rows, width), experts = x.shape, router.shape[1]
    run = _run_length(width, _TILE // max(experts, 8))
    padded = pl.cdiv(rows, row_align) * row_align

    def body(*refs: _Ref) -> None:
        row = pl.program_id(0)
        if padded == rows:
            return real_row(row, *refs)
        pl.when(row < rows)(lambda: real_row(row, *refs))
        pl.when(row >= rows)(lambda: zero_row(row, refs[6]))

    def zero_row(row: jax.Array, normed_ref: _Ref) -> None:
        for at in _runs(width, run):
            normed_ref[row, at] = jnp.zeros(run, x.dtype)

    def real_row(
        row: jax.Array,
        x_ref: _Ref,
        out_ref: _Ref,
        scale_ref: _Ref,
        router_ref: _Ref,
        real_ref: _Ref,
        total_ref: _Ref,
        normed_ref: _Ref,
        logits_ref: _Ref,
        share_ref: _Ref,
        expert_ref: _Ref,
    ) -> None:
        runs = _runs(width, run)
        matrices = [router_ref[at, :] for at in runs]
        scale_parts = [scale_ref[at] for at in runs]
        totals = [_weighted_sum(x_ref[row, at], out_ref[row, at], scales) for at in runs]
        parts = [part.astype(jnp.float32) for part in totals]
        normed = _norm(parts, scale_parts, width, eps, x.dtype)
        products = jnp.zeros((run, experts), jnp.float32)
        for i, at in enumerate(runs):
            total_ref[row, at] = totals[i]
            normed_ref[row, at] = normed[i]
            products += normed[i].astype(jnp.float32)[:, None] * matrices[i]
        logits = products.sum(0)
        logits_ref[row, :] = logits
        top, chosen = _top_k(logits, top_k)
        total = sum(top[1:], top[0])
        for i in range(top_k):
            share_ref[row, i] = (top[i] / total).astype(share_ref.dtype)
            expert_ref[row, i] = jnp.where(real_ref[row] != 0, chosen[i], experts)

    shapes = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((padded, width), x.dtype),
        jax.ShapeDtypeStruct((rows, experts), jnp.float32),
        jax.ShapeDtypeStruct((rows, top_k), x.dtype),
        jax.ShapeDtypeStruct((rows, top_k), jnp.int32),
    )
    call = _rows_call(body, "add_norm_route", padded, interpret)
    return Routed(*call(out_shape=shapes)(x, out, scale, router, real.astype(jnp.int32)))


def _rows_call(body: Any, name: str, rows: int, interpret: bool) -> Any:
    return functools.partial(
        pl.pallas_call,
        body,
        grid=(rows,),
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=1),
        name=name,
        interpret=interpret,
    )


def _run_length(width: int, most: int) -> int:
    """The largest power of two that divides the width, and at most so many values."""
    return min(width & -width, most)


def _runs(width: int, run: int) -> list[Any]:
    return [pl.ds(start, run) for start in range(0, width, run)]


def _weighted_sum(x: jax.Array, out: jax.Array, scales: tuple[float, float]) -> jax.Array:
    """α x + β out, each product and the sum rounded to their dtype as in XLA."""
    dtype = x.dtype

    def scaled(part: jax.Array, by: float) -> jax.Array:
        exact = part.astype(jnp.float32) * jnp.asarray(by, dtype).astype(jnp.float32)
        return exact.astype(dtype).astype(jnp.float32)

    return (scaled(x, scales[0]) + scaled(out, scales[1])).astype(dtype)


def _norm(
    parts: list[jax.Array], scales: list[jax.Array], width: int, eps: float, dtype: Any
) -> list[jax.Array]:
    """The float32 parts of one row, normed, in dtype."""
    squares = sum((part * part for part in parts[1:]), parts[0] * parts[0])
    mean_square = jnp.sum(squares) / width
    # A row of zeros, whose norm has to stay one however small eps is.
    factor = jnp.where(mean_square > 0, jax.lax.rsqrt(mean_square + eps), 0.0)

    def scaled(part: jax.Array, scale: jax.Array) -> jax.Array:
        normed = (part * factor).astype(dtype).astype(jnp.float32)
        return (normed * scale.astype(dtype).astype(jnp.float32)).astype(dtype)

    return [scaled(part, scale) for part, scale in zip(parts, scales, strict=True)]


def _top_k(logits: jax.Array, top_k: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """The k largest of softmax(logits [E]), the first of equals first, and their places."""
    weights = jnp.exp(logits - jnp.max(logits))
    probability = weights / jnp.sum(weights)
    index = jnp.arange(logits.shape[0], dtype=jnp.int32)
    mine, other = probability[:, None], probability[None]
    ahead = (other > mine) | ((other == mine) & (index[None] < index[:, None]))
    rank = jnp.sum(ahead.astype(jnp.int32), axis=1)
    top = [jnp.sum(jnp.where(rank == i, probability, 0.0)) for i in range(top_k)]
    return top, [jnp.sum(jnp.where(rank == i, index, 0)) for i in range(top_k)]
