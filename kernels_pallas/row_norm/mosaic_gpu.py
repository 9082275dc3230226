"""Few rows on Hopper, a warp group each: what XLA makes of a norm and a router is eight kernels
that take longer to start than to run.

A row lies in the registers of its warp group. TMA brings the router's matrix into shared memory
meanwhile, so that it is there when the norm is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import LOG2E, Ref
from kernels_pallas.row_norm.reference import Routed

_LANES = 128  # Threads of a warp group, and values of a row in a line.
# Bytes of the router's matrix in shared memory, beside which a multiprocessor has 28 KiB.
_HELD = 196_608
_EXPERTS = 64  # Each is a scalar in the registers of every thread.
# Each reads the router's matrix again, from the L2 cache: 50 MB at most.
_ROWS = 256


def why_not_norm(x: jax.Array) -> str | None:
    """Why the kernel cannot take rows of this width; None where it can."""
    if x.shape[1] % _LANES:
        return f"it needs a multiple of {_LANES} values a row; got {x.shape[1]}"
    return None


def why_not_route(x: jax.Array, router: jax.Array) -> str | None:
    """Why the kernel cannot take these rows and this router; None where it can."""
    if router.shape[1] > _EXPERTS:
        return f"it takes at most {_EXPERTS} experts; got {router.shape[1]}"
    if router.size * 4 > _HELD:
        return f"it holds a router's matrix of up to {_HELD // 4} values; got {router.size}"
    if x.shape[0] > _ROWS:
        return f"it takes at most {_ROWS} rows; got {x.shape[0]}"
    return why_not_norm(x)


@functools.partial(jax.jit, static_argnames=("eps", "row_align", "interpret"))
def row_norm_mosaic_gpu(
    x: jax.Array, scale: jax.Array, eps: float, *, row_align: int = 1, interpret: Any = None
) -> jax.Array:
    """`row_norm`. Shapes as in the public function."""

    def norm(row: jax.Array, x_ref: Ref, scale_ref: Ref) -> jax.Array:
        x32 = _load(x_ref.at[row]).astype(jnp.float32)
        return _norm(x32, _load(scale_ref), eps, x.dtype)

    return _map_rows(norm, "row_norm", x, (scale,), row_align, interpret)


@functools.partial(jax.jit, static_argnames=("eps", "row_align", "interpret"))
def gated_row_norm_mosaic_gpu(
    x: jax.Array,
    gates: jax.Array,
    scale: jax.Array,
    eps: float,
    *,
    row_align: int = 1,
    interpret: Any = None,
) -> jax.Array:
    """`row_norm` of x [N, D], each value times the sigmoid of its gate.

    Args:
      x: Rows [N, D].
      gates: [N', P], of whose first N rows the last D are those of x.
      scale: [D].
      eps: Added to the mean square.
      row_align: As for `row_norm`.
      interpret: For tests.
    """

    def gated(row: jax.Array, x_ref: Ref, gates_ref: Ref, scale_ref: Ref) -> jax.Array:
        lines = x_ref.shape[1]
        gate = _load(gates_ref.at[row, pl.ds(gates_ref.shape[1] - lines, lines)])
        gate32 = 1 / (1 + jnp.exp2(-LOG2E * gate.astype(jnp.float32)))
        gate32 = gate32.astype(x.dtype).astype(jnp.float32)
        x32 = _load(x_ref.at[row]).astype(jnp.float32)
        normed = _norm(x32, _load(scale_ref), eps, x.dtype)
        return (gate32 * normed.astype(jnp.float32)).astype(x.dtype)

    return _map_rows(gated, "gated_row_norm", x, (gates, scale), row_align, interpret)


@functools.partial(jax.jit, static_argnames=("scales", "eps", "top_k", "row_align", "interpret"))
def add_norm_route_mosaic_gpu(
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
    interpret: Any = None,
) -> Routed:
    """`add_norm_route`. Shapes as in the public function."""
    rows, (width, experts) = real.size, router.shape
    padded = _align(rows, row_align)
    matrix = _in_lines(router.T)  # [E, D / 128, 128]; XLA takes it out of a loop of steps.

    def body(*refs: Ref) -> None:
        def in_scratch(row: jax.Array) -> None:
            pl.run_scoped(
                functools.partial(real_row, row, *refs),
                plgpu.SMEM(matrix.shape, jnp.float32),
                plgpu.Barrier(num_arrivals=1),
            )

        _each_row(in_scratch, rows, padded, refs[6])

    def real_row(
        row: jax.Array,
        x_ref: Ref,
        out_ref: Ref,
        scale_ref: Ref,
        matrix_ref: Ref,
        real_ref: Ref,
        total_ref: Ref,
        normed_ref: Ref,
        logits_ref: Ref,
        share_ref: Ref,
        expert_ref: Ref,
        matrix_smem: Ref,
        loaded: Ref,
    ) -> None:
        plgpu.copy_gmem_to_smem(matrix_ref, matrix_smem, loaded)
        parts = [_load(out_ref.at[part, row]) for part in range(out_ref.shape[0])]
        total = _weighted_sum(_load(x_ref.at[row]), sum(parts[1:], parts[0]), scales)
        normed = _norm(total.astype(jnp.float32), _load(scale_ref), eps, x.dtype)
        total_ref[row] = total
        normed_ref[row] = normed
        normed32 = normed.astype(jnp.float32)
        plgpu.barrier_wait(loaded)
        logits = [jnp.sum(normed32 * _load(matrix_smem.at[e])) for e in range(experts)]
        for e, logit in enumerate(logits):
            logits_ref[row, e] = logit
        top, chosen = _top_k(logits, top_k)
        for i, weight in enumerate(top):
            share_ref[row, i] = (weight / sum(top[1:], top[0])).astype(share_ref.dtype)
            expert_ref[row, i] = jnp.where(real_ref[row] != 0, chosen[i], experts)

    lines = _in_lines(x)
    shapes = (
        jax.ShapeDtypeStruct((rows, *lines.shape[1:]), x.dtype),
        jax.ShapeDtypeStruct((padded, *lines.shape[1:]), x.dtype),
        jax.ShapeDtypeStruct((rows, experts), jnp.float32),
        jax.ShapeDtypeStruct((rows, top_k), x.dtype),
        jax.ShapeDtypeStruct((rows, top_k), jnp.int32),
    )
    call = _rows_call(body, shapes, "add_norm_route", padded, interpret)
    parts = out if out.ndim == 3 else out[None]
    total, normed, *routed = call(
        lines, _in_lines(parts), _in_lines(scale), matrix, real.astype(jnp.int32)
    )
    return Routed(total.reshape(rows, width), normed.reshape(padded, width), *routed)


def _align(rows: int, row_align: int) -> int:
    return pl.cdiv(rows, row_align) * row_align


def _map_rows(
    compute: Callable[..., jax.Array],
    name: str,
    x: jax.Array,
    others: Sequence[jax.Array],
    row_align: int,
    interpret: Any,
) -> jax.Array:
    """`compute(row, *refs of x and the others)` of each row of x [N, D], and zeros below."""
    rows, padded = x.shape[0], _align(x.shape[0], row_align)

    def body(*refs: Ref) -> None:
        *ins, out_ref = refs

        def real_row(row: jax.Array) -> None:
            out_ref[row] = compute(row, *ins)

        _each_row(real_row, rows, padded, out_ref)

    operands = [_in_lines(a) for a in (x, *others)]
    shape = jax.ShapeDtypeStruct((padded, *operands[0].shape[1:]), x.dtype)
    result: jax.Array = _rows_call(body, shape, name, padded, interpret)(*operands)
    return result.reshape(padded, -1)


def _each_row(real_row: Callable[[jax.Array], None], rows: int, padded: int, out_ref: Ref) -> None:
    """`real_row` of a block's row, zeros in out_ref where it is past the rows."""
    row = lax.axis_index("row")
    pl.when(row < rows)(lambda: real_row(row))
    if padded > rows:
        # In the layout of what is loaded: JAX 0.11 cannot store an odd number of float32 lines of
        # one value in any other.
        lines = out_ref.shape[1]
        zeros = plgpu.layout_cast(jnp.zeros((lines, _LANES), out_ref.dtype), _layout(lines))
        pl.when(row >= rows)(lambda: out_ref.at[row].set(zeros))


def _rows_call(body: Any, out_type: Any, name: str, rows: int, interpret: Any) -> Any:
    return pl.kernel(
        body,
        out_type=out_type,
        mesh=plgpu.Mesh(grid=(rows,), grid_names=("row",)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        name=name,
    )


def _in_lines(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, _LANES)


def _load(ref: Ref) -> jax.Array:
    """A row [D / 128, 128]."""
    return plgpu.load(ref, layout=_layout(ref.shape[0]))


def _layout(lines: int) -> Any:
    """Of a row, as many neighbours of it in a thread as 16 bytes of float32 hold."""
    neighbours = next(n for n in (4, 2, 1) if lines % n == 0)
    return plgpu.Layout.WG_STRIDED((lines, _LANES), vec_size=neighbours)


def _weighted_sum(x: jax.Array, out: jax.Array, scales: tuple[float, float]) -> jax.Array:
    """α x + β out in x.dtype, out, each product and the sum rounded to it as in XLA."""
    dtype = x.dtype

    def scaled(part: jax.Array, by: float) -> jax.Array:
        exact = part.astype(dtype).astype(jnp.float32) * float(dtype.type(by))
        return exact.astype(dtype).astype(jnp.float32)

    return (scaled(x, scales[0]) + scaled(out, scales[1])).astype(dtype)


def _norm(x32: jax.Array, scale: jax.Array, eps: float, dtype: Any) -> jax.Array:
    """The float32 row, normed, in dtype."""
    mean_square = jnp.sum(x32 * x32) / x32.size
    # A row of zeros, whose norm has to stay one however small eps is.
    factor = jnp.where(mean_square > 0, lax.rsqrt(mean_square + eps), 0.0)
    normed = (x32 * factor).astype(dtype).astype(jnp.float32)
    return (normed * scale.astype(dtype).astype(jnp.float32)).astype(dtype)


def _top_k(logits: Sequence[jax.Array], top_k: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """The k largest of softmax(logits), the first of equals first, and their places."""
    most = functools.reduce(jnp.maximum, logits)
    weights = [jnp.exp(logit - most) for logit in logits]
    total = sum(weights[1:], weights[0])
    left = [weight / total for weight in weights]
    top, chosen = [], []
    for _ in range(top_k):
        best, place = left[0], jnp.int32(0)
        for e, probability in enumerate(left[1:], 1):
            ahead = probability > best
            best, place = jnp.where(ahead, probability, best), jnp.where(ahead, e, place)
        left = [jnp.where(place == e, -1.0, probability) for e, probability in enumerate(left)]
        top.append(best)
        chosen.append(place)
    return top, chosen
