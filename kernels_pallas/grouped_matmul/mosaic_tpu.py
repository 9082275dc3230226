"""The grouped product and SwiGLU for TPUs, in Pallas: two kernels.

Rows are cut into tiles; a visit is one group's share of one tile (`visits`). `_rows_kernel` runs
on the grid (columns, visits, terms): the groups that share a tile come to it one after the other
while it stays in VMEM, and each writes its own rows. It is the product itself, its gradient in lhs
(rhs contracted over its last axis, nothing transposed in memory) and both up-projections of SwiGLU
at once. `_matrices_kernel` runs on the grid (rows of the result, columns, visits) and contracts the
rows of each group: the gradient in rhs.

The number of visits is known on the device alone, and the grid ends there. Rows that belong to no
group, and memory past the last row, may hold anything, NaN included.

JAX's megablox leaves the rows past the last group as they are, and takes whole tiles of rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul.swiglu import gate, gate_gradients

type Ref = Any  # Pallas' references and the scalars inside a kernel have no public type.
type Scalar = Any
type _Shaped = jax.Array | jax.ShapeDtypeStruct
type _Arrays = Sequence[jax.Array]

_LANES, _SUBLANES = 128, 16
# Beside the blocks, what the compiler wants for values in flight.
_VMEM_IN_FLIGHT = 12 * 2**20


class Blocks(NamedTuple):
    """At most so many rows, columns of the result, and terms of the contraction in a block."""

    rows: int = 512
    columns: int = 1024
    terms: int = 1024


def why_not(lhs: _Shaped, *rhs: _Shaped) -> str | None:
    """Why the kernels cannot take lhs [M, K] and matrices [E, K, N]; None where they can."""
    dtypes = {str(x.dtype) for x in (lhs, *rhs)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        return f"it takes bfloat16 or float32, all alike; got {', '.join(sorted(dtypes))}"
    if 0 in (*lhs.shape, *rhs[0].shape):
        return f"it takes no empty arrays; got {lhs.shape} and {rhs[0].shape}"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul_mosaic_tpu(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, blocks: Blocks | None = None
) -> jax.Array:
    """`grouped_matmul` on a TPU; see the public function."""
    return _rows_kernel([lhs], [rhs], group_sizes, blocks)[0]


def _forward(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, blocks: Blocks | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return grouped_matmul_mosaic_tpu(lhs, rhs, group_sizes, blocks), (lhs, rhs, group_sizes)


def _backward(
    blocks: Blocks | None, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array | np.ndarray, ...]:
    lhs, rhs, sizes = residuals
    [d_lhs] = _rows_kernel([d_out], [rhs], sizes, blocks, transposed=True)
    d_rhs = _matrices_kernel(lhs, d_out, sizes, blocks)
    return d_lhs, d_rhs, np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul_mosaic_tpu.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_swiglu_mosaic_tpu(
    lhs: jax.Array,
    w1: jax.Array,
    w3: jax.Array,
    group_sizes: jax.Array,
    blocks: Blocks | None = None,
) -> jax.Array:
    """`grouped_swiglu` on a TPU; see the public function."""
    epilogue = _Epilogue(1, lambda h1, h3: (gate(h1, h3),))
    return _rows_kernel([lhs], [w1, w3], group_sizes, blocks, epilogue=epilogue)[0]


def _swiglu_forward(
    lhs: jax.Array,
    w1: jax.Array,
    w3: jax.Array,
    group_sizes: jax.Array,
    blocks: Blocks | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    epilogue = _Epilogue(3, lambda h1, h3: (gate(h1, h3), h1, h3))
    out, h1, h3 = _rows_kernel([lhs], [w1, w3], group_sizes, blocks, epilogue=epilogue)
    return out, (lhs, w1, w3, group_sizes, h1, h3)


def _swiglu_backward(
    blocks: Blocks | None, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array | np.ndarray, ...]:
    lhs, w1, w3, sizes, h1, h3 = residuals
    d_h = gate_gradients(h1, h3, d_out)
    [d_lhs] = _rows_kernel(d_h, [w1, w3], sizes, blocks, transposed=True)
    d_w1, d_w3 = (_matrices_kernel(lhs, d, sizes, blocks) for d in d_h)
    return d_lhs, d_w1, d_w3, np.zeros(sizes.shape, jax.dtypes.float0)


grouped_swiglu_mosaic_tpu.defvjp(_swiglu_forward, _swiglu_backward)


class _Epilogue(NamedTuple):
    """What becomes of the products of a block: so many results."""

    outputs: int = 1
    results: Callable[..., Sequence[jax.Array]] = lambda x: (x,)


class Visits(NamedTuple):
    """Visits [V] int32, V enough for any sizes: group, E for the rows past the last group; tile;
    the rows low <= row < high of the tile that belong to the group.
    """

    group: Any
    tile: Any
    low: Any
    high: Any


def visits(
    group_sizes: jax.Array, rows: int, block: int, *, every_group: bool
) -> tuple[Visits, jax.Array]:
    """The visits to tiles of `block` rows, group after group, and their number [].

    With every_group, each group has one even where it is empty, and there is no group E; without,
    each tile has one.
    """
    if every_group:
        sizes = group_sizes
    else:
        sizes = jnp.concatenate([group_sizes, rows - jnp.sum(group_sizes, keepdims=True)])
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    tiles = pl.cdiv(rows, block)
    # An empty group behind the last row looks at the last tile.
    firsts = jnp.minimum(starts // block, tiles - 1)
    counts = jnp.where(sizes > 0, (ends + block - 1) // block - firsts, int(every_group))
    visit_ends = jnp.cumsum(counts)
    index = jnp.arange(tiles + sizes.shape[0], dtype=jnp.int32)
    group = jnp.sum(index[:, None] >= visit_ends[None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, sizes.shape[0] - 1)
    tile = firsts[group] + index - (visit_ends - counts)[group]
    tile = jnp.minimum(tile, tiles - 1)
    low = jnp.maximum(starts[group] - tile * block, 0)
    high = jnp.minimum(ends[group] - tile * block, block)
    return Visits(group, tile, low, high), visit_ends[-1]


def _rows_kernel(
    lhs: _Arrays,
    rhs: _Arrays,
    group_sizes: jax.Array,
    blocks: Blocks | None,
    *,
    transposed: bool = False,
    epilogue: _Epilogue = _Epilogue(),  # noqa: B008
) -> list[jax.Array]:
    """Rows times their group's matrix, [M, N] each.

    With as many lhs as rhs, the sum of their products; with one lhs, the epilogue of its product
    with each rhs. `transposed`: rhs is [E, N, K].
    """
    rows, groups = lhs[0].shape[0], rhs[0].shape[0]
    columns = rhs[0].shape[1 if transposed else 2]
    lhs, rhs = [_pad(x, _SUBLANES, _LANES) for x in lhs], [_pad(x, _LANES, _LANES) for x in rhs]
    padded, inner = lhs[0].shape
    wide = rhs[0].shape[1 if transposed else 2]
    products = len(rhs) // len(lhs)
    block = _blocks(blocks, lhs[0].dtype, padded, wide, inner, products)
    table, count = visits(group_sizes, padded, block.rows, every_group=False)
    steps = inner // block.terms

    def place(v: Scalar, k: Scalar, n: int, table: Visits) -> tuple[Scalar, Scalar]:
        """Tile and terms of the n-th lhs: not moving in the others' turns, nor without a group."""
        own = jnp.clip(k - n * steps, 0, steps - 1)
        return table.tile[v], jnp.where(table.group[v] < groups, own, 0)

    def lhs_spec(n: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (block.rows, block.terms), lambda j, v, k, *t: place(v, k, n, Visits(*t))
        )

    def rhs_spec(n: int) -> pl.BlockSpec:
        def index(j: Scalar, v: Scalar, k: Scalar, *t: Ref) -> tuple[Scalar, ...]:
            _, own = place(v, k, n // products, Visits(*t))
            group = jnp.minimum(Visits(*t).group[v], groups - 1)
            return (group, j, own) if transposed else (group, own, j)

        shape = (block.columns, block.terms) if transposed else (block.terms, block.columns)
        return pl.BlockSpec((None, *shape), index)

    def kernel(*refs: Ref) -> None:
        table, refs = Visits(*refs[:4]), refs[4:]
        lhs_refs, rhs_refs, refs = (
            refs[: len(lhs)],
            refs[len(lhs) :][: len(rhs)],
            refs[len(lhs) + len(rhs) :],
        )
        outs, sums = refs[: epilogue.outputs], refs[epilogue.outputs :]
        v, k = pl.program_id(1), pl.program_id(2)
        mine = table.group[v] < groups

        @pl.when(k == 0)
        def _begin() -> None:
            for x in sums:
                x[...] = jnp.zeros_like(x)

        for n, left in enumerate(lhs_refs):

            @pl.when(mine & (k >= n * steps) & (k < (n + 1) * steps))
            def _add(n: int = n, left: Ref = left) -> None:
                for x, right in zip(sums, rhs_refs[n * products :], strict=False):
                    x[...] += _dot(left[...], right[...], 1, 1 if transposed else 0)

        @pl.when(k == len(lhs) * steps - 1)
        def _end() -> None:
            first = (v == 0) | (table.tile[v] != table.tile[jnp.maximum(v - 1, 0)])
            for out, x in zip(outs, epilogue.results(*(x[...] for x in sums)), strict=True):
                others = jnp.where(first, 0, out[...].astype(jnp.float32))
                own = _between(x.shape, table.low[v], table.high[v])
                out[...] = jnp.where(own, x, others).astype(out.dtype)

    outs = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((padded, wide), lhs[0].dtype)] * epilogue.outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(wide // block.columns, count, len(lhs) * steps),
            in_specs=[*map(lhs_spec, range(len(lhs))), *map(rhs_spec, range(len(rhs)))],
            out_specs=[
                pl.BlockSpec(
                    (block.rows, block.columns), lambda j, v, k, *t: (Visits(*t).tile[v], j)
                )
            ]
            * epilogue.outputs,
            scratch_shapes=[pltpu.VMEM((block.rows, block.columns), jnp.float32)] * products,
        ),
        compiler_params=_params(
            block, lhs[0].dtype, (len(lhs), len(rhs), epilogue.outputs), products
        ),
        cost_estimate=_cost(padded * inner * wide * len(rhs), [*lhs, *rhs], padded * wide),
        name="grouped_matmul",
    )(*table, *lhs, *rhs)
    return [x[:rows, :columns] for x in outs]


def _matrices_kernel(
    lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array, blocks: Blocks | None
) -> jax.Array:
    """lhsᵀ d_out over the rows of each group, [E, K, N]."""
    inner, columns = lhs.shape[1], d_out.shape[1]
    lhs, d_out = (_pad(x, _SUBLANES, _LANES) for x in (lhs, d_out))
    (rows, tall), wide = lhs.shape, d_out.shape[1]
    block = _blocks(blocks, lhs.dtype, rows, wide, tall, 1)
    groups = group_sizes.shape[0]
    table, count = visits(group_sizes, rows, block.rows, every_group=True)

    def kernel(*refs: Ref) -> None:
        table, (left, right, out, total) = Visits(*refs[:4]), refs[4:]
        v, last = pl.program_id(2), pl.num_programs(2) - 1
        group, low, high = table.group[v], table.low[v], table.high[v]

        @pl.when((v == 0) | (table.group[jnp.maximum(v - 1, 0)] != group))
        def _begin() -> None:
            total[...] = jnp.zeros_like(total)

        @pl.when((low == 0) & (high == block.rows))
        def _add() -> None:
            total[...] += _dot(left[...], right[...], 0, 0)

        @pl.when((low < high) & ((low > 0) | (high < block.rows)))
        def _add_part() -> None:
            # Both, since a row of another group may hold an infinity or NaN.
            own_left, own_right = (_keep_rows(x[...], low, high) for x in (left, right))
            total[...] += _dot(own_left, own_right, 0, 0)

        @pl.when((v == last) | (table.group[jnp.minimum(v + 1, last)] != group))
        def _end() -> None:
            out[...] = total[...].astype(out.dtype)

    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((groups, tall, wide), lhs.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(tall // block.terms, wide // block.columns, count),
            in_specs=[
                pl.BlockSpec(
                    (block.rows, block.terms), lambda i, j, v, *t: (Visits(*t).tile[v], i)
                ),
                pl.BlockSpec(
                    (block.rows, block.columns), lambda i, j, v, *t: (Visits(*t).tile[v], j)
                ),
            ],
            out_specs=pl.BlockSpec(
                (None, block.terms, block.columns), lambda i, j, v, *t: (Visits(*t).group[v], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((block.terms, block.columns), jnp.float32)],
        ),
        compiler_params=_params(
            block._replace(rows=block.terms, terms=block.rows), lhs.dtype, (1, 1, 1), 1
        ),
        cost_estimate=_cost(rows * tall * wide, [lhs, d_out], groups * tall * wide),
        name="grouped_matmul_d_rhs",
    )(*table, lhs, d_out)
    return out[:, :inner, :columns]


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    # float32 in true float32, where the default is one pass of bf16.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _between(shape: tuple[int, ...], low: Scalar, high: Scalar) -> jax.Array:
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= low) & (row < high)


def _keep_rows(x: jax.Array, low: Scalar, high: Scalar) -> jax.Array:
    # A select, since NaN times 0 is NaN; in float32, whose masks every TPU has.
    kept = jnp.where(_between(x.shape, low, high), x.astype(jnp.float32), 0)
    return kept.astype(x.dtype)


def _blocks(
    blocks: Blocks | None,
    dtype: jnp.dtype,
    rows: int,
    columns: int,
    terms: int,
    products: int,
) -> Blocks:
    """Blocks that divide the padded columns and terms; two products halve the columns."""
    rows_most, columns_most, terms_most = blocks or Blocks(terms=2048 // jnp.dtype(dtype).itemsize)

    def divisor(size: int, most: int) -> int:
        lanes = size // _LANES
        return _LANES * max(n for n in range(1, max(most // _LANES, 1) + 1) if lanes % n == 0)

    return Blocks(
        min(rows_most, rows), divisor(columns, columns_most // products), divisor(terms, terms_most)
    )


def _params(
    block: Blocks, dtype: jnp.dtype, arrays: tuple[int, int, int], products: int
) -> pltpu.CompilerParams:
    """arrays: how many of [rows, terms], [terms, columns] and [rows, columns], double-buffered."""
    rows, columns, terms = block
    lefts, rights, outs = arrays
    elements = rows * terms * lefts + terms * columns * rights + rows * columns * outs
    vmem = 2 * elements * jnp.dtype(dtype).itemsize + 4 * products * rows * columns
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=vmem + _VMEM_IN_FLIGHT,
    )


def _cost(multiply_adds: int, inputs: _Arrays, written: int) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * multiply_adds,
        bytes_accessed=sum(x.nbytes for x in inputs) + written * inputs[0].dtype.itemsize,
        transcendentals=0,
    )


def _pad(x: jax.Array, *multiples: int) -> jax.Array:
    """Zeros behind the last two axes, up to multiples."""
    widths = [(0, 0)] * (x.ndim - 2)
    widths += [(0, -n % m) for n, m in zip(x.shape[-2:], multiples, strict=True)]
    return jnp.pad(x, widths) if any(high for _, high in widths) else x
