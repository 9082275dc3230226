"""The grouped product and SwiGLU on Hopper, in Pallas on Mosaic GPU: two persistent kernels.

`_rows_kernel` multiplies tiles of rows with the matrix of their group: the product itself, its
gradient in lhs (rhs read through a transposed view of shared memory), and both up-projections of
SwiGLU at once. `_matrices_kernel` contracts each group's rows: the gradient in rhs.

Each multiprocessor holds one block of threads that walks over tiles: one warp group keeps TMA loads
in flight through a ring of stages, across the borders of tiles, and one or two issue WGMMA and
write results, 64 rows of a tile each. Tiles of rows start at the first multiple of eight at or
before their group's first row, which is what TMA can address, and are listed in a table that XLA
computes (`row_tiles`). Rows of other groups in a tile are computed and not stored, or masked where
they are contracted. The rows past the last group are one more group, whose product has no terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.grouped_matmul.swiglu import (
    gate,
    gate_gradients,
    weight_gradients,
    weighted,
    weighted_gate,
)
from kernels_pallas.hopper import Ref, tiled
from kernels_pallas.numerics import fill_rows, product

type Scalar = Any  # The scalars inside a kernel have no public type.
type _Shaped = jax.Array | jax.ShapeDtypeStruct

# Columns and rows of a tile of shared memory in bf16, see `hopper.tiled`.
_LANES, ROW_ALIGN = 64, 8
# Rows of a tile that a warp group multiplies, and the side of the squares that it stores.
_PIECE = 64
# A tile of few rows loads no more than this many of its left operand.
_FEW = 16
_LOADER_REGISTERS, _WORKER_REGISTERS = 24, 240
_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


class Blocks(NamedTuple):
    """How the work is cut.

    rows, columns: of a tile of the result; rows are 64 for each warp group that multiplies, columns
    a multiple of 64 (of 128 for SwiGLU). stages: loads in flight. panel: tiles side by side that
    are worked on together, so that L2 holds what they share.
    """

    rows: int = 128
    columns: int = 256
    stages: int = 4
    panel: int = 8


# Few rows a group: many small loads of the matrices, which are all there is to read. Narrow tiles,
# by the number of matrices, where wide ones would leave multiprocessors without any.
_DECODING = Blocks(rows=64, columns=256, stages=5)
_NARROW = {
    1: Blocks(rows=64, columns=64, stages=12),
    2: Blocks(rows=64, columns=128, stages=8),
}


def why_not(lhs: _Shaped, *rhs: _Shaped) -> str | None:
    """Why the kernels cannot take lhs [M, K] and matrices [E, K, N]; None where they can."""
    dtypes = {x.dtype for x in (lhs, *rhs)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        # The tensor cores have TF32 and no float32.
        return f"it takes bfloat16; got {', '.join(sorted(map(str, dtypes)))}"
    inner, columns = rhs[0].shape[1:]
    if inner % _LANES or columns % _LANES or not (inner and columns):
        return f"it needs K and N in multiples of {_LANES}; got K = {inner}, N = {columns}"
    return None


def default_blocks(what: str, rows: int, groups: int, columns: int, cores: int) -> Blocks:
    """Blocks of a pass ("forward" | "swiglu" | "d_lhs" | "d_rhs") over rows in groups, whose result
    has so many columns, on a GPU of so many multiprocessors.
    """
    if what == "d_rhs" or rows > _PIECE * groups:
        return Blocks()
    matrices = 2 if what == "swiglu" else 1
    few = min(rows, groups) * pl.cdiv(columns, _DECODING.columns // matrices) < cores
    return _NARROW[matrices] if few else _DECODING


class Passes(NamedTuple):
    """Blocks of the product and of its gradients in lhs and rhs, and the GPU's multiprocessors."""

    forward: Blocks
    d_lhs: Blocks
    d_rhs: Blocks
    cores: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul_mosaic_gpu(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, passes: Passes
) -> jax.Array:
    """`grouped_matmul` on Hopper; see the public function."""
    blocks, cores = passes.forward, passes.cores
    return _grouped_rows([lhs], [rhs], group_sizes, blocks, cores)[0]


def _forward(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, passes: Passes
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return grouped_matmul_mosaic_gpu(lhs, rhs, group_sizes, passes), (lhs, rhs, group_sizes)


def _backward(
    passes: Passes, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    lhs, rhs, sizes = residuals
    [d_lhs] = _grouped_rows([d_out], [rhs], sizes, passes.d_lhs, passes.cores, transposed=True)
    d_rhs = _matrices_kernel(lhs, d_out, sizes, passes.d_rhs, passes.cores)
    return d_lhs, d_rhs, np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul_mosaic_gpu.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_swiglu_mosaic_gpu(
    lhs: jax.Array,
    w1: jax.Array,
    w3: jax.Array,
    group_sizes: jax.Array,
    row_weights: jax.Array | None,
    passes: Passes,
) -> jax.Array:
    """`grouped_swiglu` on Hopper; see the public function."""
    blocks, cores = passes.forward, passes.cores
    out = _grouped_rows([lhs], [w1, w3], group_sizes, blocks, cores, epilogue=_GATED)[0]
    return out if row_weights is None else weighted(out, row_weights)


def _swiglu_forward(
    lhs: jax.Array,
    w1: jax.Array,
    w3: jax.Array,
    group_sizes: jax.Array,
    row_weights: jax.Array | None,
    passes: Passes,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    # The gate of weighted rows is XLA's: under a policy that keeps products, the backward then
    # computes it again from h1 and h3, where the kernel would have to multiply again.
    epilogue = _PRODUCTS_AND_GATED if row_weights is None else _PRODUCTS
    blocks, cores = passes.forward, passes.cores
    h1, h3, *out = _grouped_rows([lhs], [w1, w3], group_sizes, blocks, cores, epilogue=epilogue)
    h1, h3 = product(h1), product(h3)
    residuals = (lhs, w1, w3, group_sizes, row_weights, h1, h3)
    return out[0] if row_weights is None else weighted_gate(h1, h3, row_weights), residuals


def _swiglu_backward(
    passes: Passes, residuals: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array | np.ndarray | None, ...]:
    lhs, w1, w3, sizes, row_weights, h1, h3 = residuals
    d_weights = None
    if row_weights is not None:
        d_weights = weight_gradients(h1, h3, d_out).astype(row_weights.dtype)
        d_out = weighted(d_out, row_weights)
    d_h = gate_gradients(h1, h3, d_out)
    [d_lhs] = _grouped_rows(d_h, [w1, w3], sizes, passes.d_lhs, passes.cores, transposed=True)
    d_w1, d_w3 = (_matrices_kernel(lhs, d, sizes, passes.d_rhs, passes.cores) for d in d_h)
    return d_lhs, d_w1, d_w3, np.zeros(sizes.shape, jax.dtypes.float0), d_weights


grouped_swiglu_mosaic_gpu.defvjp(_swiglu_forward, _swiglu_backward)


class _Epilogue(NamedTuple):
    """What becomes of the products of a tile: so many results."""

    outputs: int = 1
    results: Callable[..., Sequence[jax.Array]] = lambda x: (x,)


_PRODUCT = _Epilogue()
_GATED = _Epilogue(1, lambda h1, h3: (gate(h1, h3),))
_PRODUCTS = _Epilogue(2, lambda h1, h3: (h1, h3))
_PRODUCTS_AND_GATED = _Epilogue(3, lambda h1, h3: (h1, h3, gate(h1, h3)))


class RowTiles(NamedTuple):
    """Tiles of rows of contiguous groups, [T] int32 each with T enough for any sizes.

    group: E for the rows past the last group; row: the tile's first, a multiple of eight; the rows
    low <= row < high of the tile belong to the group. ends [E + 1]: tiles up to and with a group's.
    """

    group: Any
    row: Any
    low: Any
    high: Any
    ends: Any


class _Turn(NamedTuple):
    """A tile of rows: its group, its first row in lhs and in the result, both multiples of eight,
    and the rows low <= row < high of it that belong to the group.
    """

    group: Scalar
    source: Scalar
    row: Scalar
    low: Scalar
    high: Scalar


class _Turns(NamedTuple):
    """Tiles of rows one after another: arrays for the kernel, and from their refs the number of
    tiles and the one at a place.
    """

    arrays: tuple[jax.Array, ...]
    count: Callable[..., Scalar]
    at: Callable[..., _Turn]


def _contiguous(group_sizes: jax.Array, rows: int, block: int) -> _Turns:
    def at(place: Scalar, *refs: Ref) -> _Turn:
        group, row, low, high = (ref[place] for ref in refs[:4])
        return _Turn(group, row, row, low, high)

    def count(*refs: Ref) -> Scalar:
        return RowTiles(*refs).ends[group_sizes.shape[0]]

    return _Turns(row_tiles(group_sizes, rows, block), count, at)


def _listed(groups: jax.Array, each: int, count: int, *, shared: bool) -> _Turns:
    """A tile for each of groups [T], of `count` among `each` rows; shared: all have one lhs."""

    def at(place: Scalar, ref: Ref) -> _Turn:
        row = place * each
        source = jnp.int32(0) if shared else row
        return _Turn(ref[place], source, row, jnp.int32(0), jnp.int32(count))

    return _Turns((groups,), lambda _: jnp.int32(groups.size), at)


def row_tiles(group_sizes: jax.Array, rows: int, block: int) -> RowTiles:
    """Tiles of `block` rows, in three small kernels of XLA's: a decoding step waits for them.

    Sums through a mask, where JAX's cumsum and gathers are a chain of many.
    """
    groups = group_sizes.shape[0]
    index = jnp.arange(groups + 1, dtype=jnp.int32)
    before = index[None] < index[:, None]  # [E + 1, E + 1]
    starts = jnp.sum(jnp.where(before[:, :groups], group_sizes[None], 0), axis=1, dtype=jnp.int32)
    ends = jnp.where(index < groups, starts + jnp.pad(group_sizes, (0, 1)), rows)
    firsts = starts // ROW_ALIGN * ROW_ALIGN
    counts = jnp.where(ends > starts, (ends - firsts + block - 1) // block, 0)
    tiles = jnp.sum(jnp.where(before, counts[None], 0), axis=1, dtype=jnp.int32)[None]
    most = (rows + (ROW_ALIGN - 1) * (groups + 1)) // block + groups + 1
    place = jnp.arange(most, dtype=jnp.int32)[:, None] - tiles  # of a tile in each group [T, E + 1]
    row = firsts[None] + place * block

    def chosen(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where((place >= 0) & (place < counts[None]), x, 0), 1, dtype=jnp.int32)

    low = jnp.maximum(starts[None] - row, 0)
    high = jnp.minimum(ends[None] - row, block)
    return RowTiles(chosen(index[None]), chosen(row), chosen(low), chosen(high), tiles[0] + counts)


@functools.partial(jax.jit, static_argnames="cores")
def listed_ffn_mosaic_gpu(
    x: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array, groups: jax.Array, cores: int
) -> jax.Array:
    """`listed_ffn` on Hopper, of up to 64 rows: one tile for each group of the list, so that there
    is no table to compute and the rows are not written out for each group.
    """
    count, turns = x.shape[0], groups.size
    x = fill_rows(x, ROW_ALIGN)
    each = x.shape[0]
    up, down = (
        default_blocks(what, turns, turns, w.shape[2], cores)
        for what, w in (("swiglu", w1), ("forward", w2))
    )
    first = _listed(groups, each, count, shared=True)
    [hidden] = _rows_kernel([x], [w1, w3], first, turns * each, up, cores, epilogue=_GATED)
    second = _listed(groups, each, count, shared=False)
    [out] = _rows_kernel([hidden], [w2], second, turns * each, down, cores)
    return out.reshape(turns, each, -1)[:, :count]


# Lowering a kernel takes a second of Python; under jit every layer of a model shares one lowering.
@functools.partial(jax.jit, static_argnames=("blocks", "cores", "transposed", "epilogue"))
def _grouped_rows(
    lhs: Sequence[jax.Array],
    rhs: Sequence[jax.Array],
    group_sizes: jax.Array,
    blocks: Blocks,
    cores: int,
    *,
    transposed: bool = False,
    epilogue: _Epilogue = _PRODUCT,
) -> list[jax.Array]:
    """`_rows_kernel` on contiguous groups of rows."""
    rows = lhs[0].shape[0]
    lhs = [fill_rows(x, ROW_ALIGN) for x in lhs]
    padded = lhs[0].shape[0]
    turns = _contiguous(group_sizes, padded, blocks.rows)
    outs = _rows_kernel(
        lhs, rhs, turns, padded, blocks, cores, transposed=transposed, epilogue=epilogue
    )
    return [x[:rows] for x in outs]


def _rows_kernel(
    lhs: Sequence[jax.Array],
    rhs: Sequence[jax.Array],
    turns: _Turns,
    rows: int,
    blocks: Blocks,
    cores: int,
    *,
    transposed: bool = False,
    epilogue: _Epilogue = _PRODUCT,
) -> list[jax.Array]:
    """Rows times their group's matrix, [M, N] each of so many rows.

    With as many lhs as rhs, the sum of their products; with one lhs, the epilogue of its product
    with each rhs. `transposed`: rhs is [E, N, K].
    """
    inner = lhs[0].shape[1]
    groups, columns = rhs[0].shape[0], rhs[0].shape[1 if transposed else 2]
    products = len(rhs) // len(lhs)
    width = blocks.columns // products
    tiles_across = pl.cdiv(columns, width)
    steps = inner // _LANES

    def body(*refs: Ref) -> None:
        lhs_refs, refs = refs[: len(lhs)], refs[len(lhs) :]
        rhs_refs, refs = refs[: len(rhs)], refs[len(rhs) :]
        table, refs = refs[: len(turns.arrays)], refs[len(turns.arrays) :]
        outs, (lhs_tile, rhs_tile, buffers, loaded, consumed) = (
            refs[: epilogue.outputs],
            refs[epilogue.outputs :],
        )
        offset = lax.axis_index("warp_group") * _PIECE  # of a worker's rows in the tile

        def tile(i: Scalar) -> _Tile:
            place, column = _place(i, turns.count(*table), tiles_across, blocks.panel)
            turn = turns.at(place, *table)
            terms = jnp.where(turn.group < groups, steps * len(lhs), 0)
            return _Tile(turn.group, turn.source, turn.row, column * width, *turn[3:], terms)

        def load(tile: _Tile, k: Scalar, stage: Scalar) -> None:
            for n, left in enumerate(lhs_refs):
                right = rhs_refs[n * products : (n + 1) * products]
                turn = (k >= n * steps) & (k < (n + 1) * steps)
                pl.when(turn)(functools.partial(copy, tile, left, right, k - n * steps, stage))

        def copy(tile: _Tile, left: Ref, right: Sequence[Ref], k: Scalar, stage: Scalar) -> None:
            terms, window = pl.ds(k * _LANES, _LANES), pl.ds(tile.column, width)
            row = pl.multiple_of(tile.source, ROW_ALIGN)

            def copy_left(count: int) -> None:
                plgpu.copy_gmem_to_smem(
                    left.at[pl.ds(row, count), terms],
                    lhs_tile.at[stage, pl.ds(0, count)],
                    loaded.at[stage],
                )

            few = tile.high <= _FEW
            pl.when(few)(lambda: copy_left(_FEW))
            pl.when(jnp.logical_not(few))(lambda: copy_left(blocks.rows))
            for n, ref in enumerate(right):
                source = (window, terms) if transposed else (terms, window)
                plgpu.copy_gmem_to_smem(
                    ref.at[tile.group, *source], rhs_tile.at[stage, n], loaded.at[stage]
                )

        def multiply(tile: _Tile, k: Scalar, stage: Scalar, sums: Sequence[Ref]) -> None:
            left = lhs_tile.at[stage, pl.ds(offset, _PIECE)]
            for n, x in enumerate(sums):
                right = rhs_tile.at[stage, n]
                plgpu.wgmma(x, left, right.transpose((1, 0)) if transposed else right)

        def store(tile: _Tile, sums: Sequence[jax.Array]) -> None:
            bounds = _Bounds(tile.low - offset, tile.high - offset, columns - tile.column)
            for out, x in zip(outs, epilogue.results(*sums), strict=True):

                def window(row: Scalar, column: int, rows: int, out: Ref = out) -> Ref:
                    first = tile.row + offset + row
                    if rows == _PIECE:
                        first = pl.multiple_of(first, ROW_ALIGN)
                    return out.at[pl.ds(first, rows), pl.ds(tile.column + column, _PIECE)]

                _store(buffers, x, bounds, window)

        work = _Work(turns.count(*table) * tiles_across, tile, load, multiply, store)
        _walk(work, blocks, [(_PIECE, width)] * products, loaded, consumed)

    out = jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)
    right = (width, _LANES) if transposed else (_LANES, width)
    run = _kernel(
        body, blocks, cores, [out] * epilogue.outputs, (blocks.rows, _LANES), (products, *right)
    )
    return run(*lhs, *rhs, *turns.arrays)


@functools.partial(jax.jit, static_argnames=("blocks", "cores"))
def _matrices_kernel(
    lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array, blocks: Blocks, cores: int
) -> jax.Array:
    """lhsᵀ d_out over the rows of each group, [E, K, N]."""
    lhs, d_out = fill_rows(lhs, ROW_ALIGN), fill_rows(d_out, ROW_ALIGN)
    groups, tall, wide = group_sizes.shape[0], lhs.shape[1], d_out.shape[1]
    down, across = pl.cdiv(tall, blocks.rows), pl.cdiv(wide, blocks.columns)

    def body(*refs: Ref) -> None:
        lhs_ref, d_out_ref, ends, out, lhs_tile, d_out_tile, buffers, loaded, consumed = refs
        offset = lax.axis_index("warp_group") * _PIECE  # of a worker's rows in the tile

        def first_row(group: Scalar) -> Scalar:
            return lax.div(ends[group], jnp.int32(ROW_ALIGN)) * ROW_ALIGN

        def tile(i: Scalar) -> _Tile:
            group = lax.div(i, jnp.int32(down * across))
            place, column = _place(i - group * (down * across), down, across, blocks.panel)
            # Here low and high bound the rows that are contracted.
            start, end = ends[group], ends[group + 1]
            low, high = start - first_row(group), end - first_row(group)
            terms = jnp.where(end > start, lax.div(high + _LANES - 1, jnp.int32(_LANES)), 0)
            row, column = place * blocks.rows, column * blocks.columns
            return _Tile(group, row, row, column, low, high, terms)

        def load(tile: _Tile, k: Scalar, stage: Scalar) -> None:
            terms = pl.ds(pl.multiple_of(first_row(tile.group) + k * _LANES, ROW_ALIGN), _LANES)
            plgpu.copy_gmem_to_smem(
                lhs_ref.at[terms, pl.ds(tile.row, blocks.rows)],
                lhs_tile.at[stage],
                loaded.at[stage],
            )
            plgpu.copy_gmem_to_smem(
                d_out_ref.at[terms, pl.ds(tile.column, blocks.columns)],
                d_out_tile.at[stage, 0],
                loaded.at[stage],
            )

        def multiply(tile: _Tile, k: Scalar, stage: Scalar, sums: Sequence[Ref]) -> None:
            left = lhs_tile.at[stage, :, pl.ds(offset, _PIECE)]
            right = d_out_tile.at[stage, 0]
            low, high = tile.low - k * _LANES, tile.high - k * _LANES

            # Both, since a row of another group may hold an infinity or NaN. Two workers write the
            # same values to the right operand.
            @pl.when((low > 0) | (high < _LANES))
            def _mask() -> None:
                _keep_rows(left, low, high)
                _keep_rows(right, low, high)
                plgpu.commit_smem()

            plgpu.wgmma(sums[0], left.transpose((1, 0)), right)

        def store(tile: _Tile, sums: Sequence[jax.Array]) -> None:
            def window(row: Scalar, column: int, rows: int) -> Ref:
                first = pl.multiple_of(tile.row + offset + row, ROW_ALIGN)
                return out.at[tile.group, pl.ds(first, rows), pl.ds(tile.column + column, _PIECE)]

            # Never a part of a piece, as K is a multiple of its rows.
            bounds = _Bounds(jnp.int32(0), tall - tile.row - offset, wide - tile.column)
            _store(buffers, sums[0], bounds, window)

        work = _Work(jnp.int32(groups * down * across), tile, load, multiply, store)
        _walk(work, blocks, [(_PIECE, blocks.columns)], loaded, consumed)

    out = jax.ShapeDtypeStruct((groups, tall, wide), jnp.bfloat16)
    left, right = (_LANES, blocks.rows), (1, _LANES, blocks.columns)
    run = _kernel(body, blocks, cores, [out], left, right)
    return run(lhs, d_out, jnp.cumsum(jnp.pad(group_sizes, (1, 0))))[0]


def _kernel(
    body: Callable[..., None],
    blocks: Blocks,
    cores: int,
    outs: Sequence[jax.ShapeDtypeStruct],
    left: tuple[int, int],
    right: tuple[int, int, int],
) -> Callable[..., list[jax.Array]]:
    """A kernel of one block of threads for each multiprocessor.

    left and right are the shapes of one step's operands, right with the number of them in front.
    """
    workers = blocks.rows // _PIECE
    buffers = workers, 2, _PIECE, _PIECE
    return plgpu.kernel(
        body,
        out_type=list(outs),
        scratch_types=(
            _swizzled(blocks.stages, *left),
            _swizzled(blocks.stages, *right),
            plgpu.RefUnion(_swizzled(*buffers), plgpu.SMEM(buffers, jnp.bfloat16)),
            plgpu.Barrier(num_arrivals=1 + right[0], num_barriers=blocks.stages),
            plgpu.Barrier(num_arrivals=workers, num_barriers=blocks.stages),
        ),
        grid=(cores,),
        grid_names=("multiprocessor",),
        num_threads=workers + 1,
        thread_name="warp_group",
        compiler_params=_PARAMS,
    )


def _swizzled(*shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled(2))


# From here on code runs inside the kernels.


class _Tile(NamedTuple):
    """A tile of the result: the group of its matrix, its first row in lhs, its first row and
    column, the rows low <= row < high, from the first, that belong to the group, and the steps of
    its contraction.
    """

    group: Scalar
    source: Scalar
    row: Scalar
    column: Scalar
    low: Scalar
    high: Scalar
    steps: Scalar


class _Bounds(NamedTuple):
    """Of what is stored: low <= row < high, column < right."""

    low: Scalar
    high: Scalar
    right: Scalar


class _Work(NamedTuple):
    """What the two kernels differ in.

    tiles: how many; tile: the one at a position; load: starts the loads of one step; multiply:
    starts the products of one step, one for each accumulator; store: starts to store a tile.
    """

    tiles: Scalar
    tile: Callable[[Scalar], _Tile]
    load: Callable[[_Tile, Scalar, Scalar], None]
    multiply: Callable[[_Tile, Scalar, Scalar, Sequence[Ref]], None]
    store: Callable[[_Tile, Sequence[jax.Array]], None]


def _walk(
    work: _Work,
    blocks: Blocks,
    accumulators: Sequence[tuple[int, int]],
    loaded: Ref,
    consumed: Ref,
) -> None:
    """Every so-manieth tile: the first warp groups multiply, the last one loads."""
    workers, stages = blocks.rows // _PIECE, blocks.stages
    first, step = lax.axis_index("multiprocessor"), lax.axis_size("multiprocessor")
    walks = lax.div(work.tiles - first + step - 1, jnp.int32(step))
    warp_group = lax.axis_index("warp_group")

    def stage_of(n: Scalar) -> Scalar:
        return lax.rem(n, jnp.int32(stages))

    def multiply(walk: Scalar, done: Scalar) -> Scalar:
        tile = work.tile(first + walk * step)

        def contract(*sums: Ref) -> tuple[jax.Array, ...]:
            @pl.loop(0, tile.steps)
            def _step(k: Scalar) -> None:
                stage = stage_of(done + k)
                plgpu.barrier_wait(loaded.at[stage])
                work.multiply(tile, k, stage, sums)
                plgpu.wgmma_wait(len(sums))  # The products of the step before are done.
                pl.when(k > 0)(lambda: release(done + k - 1))

            return tuple(x[...] for x in sums)

        def release(n: Scalar) -> None:
            plgpu.barrier_arrive(consumed.at[stage_of(n)])

        shapes = (plgpu.ACC(shape, jnp.float32) for shape in accumulators)
        results = pl.run_scoped(contract, *shapes)
        pl.when(tile.steps > 0)(lambda: release(done + tile.steps - 1))
        work.store(tile, results)
        return done + tile.steps

    def load(walk: Scalar, done: Scalar) -> Scalar:
        tile = work.tile(first + walk * step)

        @pl.loop(0, tile.steps)
        def _step(k: Scalar) -> None:
            stage = stage_of(done + k)
            pl.when(done + k >= stages)(lambda: plgpu.barrier_wait(consumed.at[stage]))
            work.load(tile, k, stage)

        return done + tile.steps

    @pl.when(warp_group < workers)
    def _multiply() -> None:
        if workers > 1:
            plgpu.set_max_registers(_WORKER_REGISTERS, action="increase")
        lax.fori_loop(0, walks, multiply, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warp_group == workers)
    def _load() -> None:
        if workers > 1:
            plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        lax.fori_loop(0, walks, load, jnp.int32(0))


def _place(i: Scalar, rows: Scalar, columns: int, panel: int) -> tuple[Scalar, Scalar]:
    """Row and column of the i-th tile of a grid, panel after panel of some columns."""
    panel = next(p for p in range(min(panel, columns), 0, -1) if columns % p == 0)
    which = lax.div(i, rows * panel)
    inside = i - which * rows * panel
    row = lax.div(inside, jnp.int32(panel))
    return row, which * panel + (inside - row * panel)


def _keep_rows(ref: Ref, low: Scalar, high: Scalar) -> None:
    """Zeroes the rows of an operand that are not low <= row < high."""
    for first in range(0, ref.shape[1], _LANES):
        part = ref.at[:, pl.ds(first, _LANES)]
        x = plgpu.load(part, layout=plgpu.Layout.WGMMA)
        row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where((row >= low) & (row < high), x, jnp.bfloat16(0))


def _store_unswizzled(ref: Ref, x: jax.Array) -> None:
    """Stores with the bank conflicts of rows without a swizzle, which JAX 0.12 has to be asked for
    and JAX 0.11 cannot be.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def _store(buffers: Ref, x: jax.Array, bounds: _Bounds, window: Callable[..., Ref]) -> None:
    """Starts to store the part of x [64, N] within the bounds; window(row, column, rows) says
    where.
    """
    low, high, right = bounds
    whole = (low <= 0) & (high >= _PIECE)
    swizzled, plain = (ref.at[lax.axis_index("warp_group")] for ref in buffers)
    x = x.astype(jnp.bfloat16)

    def write_whole(n: int, piece: jax.Array) -> None:
        swizzled.at[n % 2][...] = piece
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            swizzled.at[n % 2], window(0, n * _PIECE, _PIECE), commit_group=False
        )

    def write_rows(n: int, piece: jax.Array) -> None:
        # TMA moves boxes of constant size: here row by row.
        _store_unswizzled(plain.at[n % 2], piece)
        plgpu.commit_smem()

        @pl.loop(jnp.maximum(low, 0), jnp.minimum(high, _PIECE))
        def _row(row: Scalar) -> None:
            source = plain.at[n % 2, pl.ds(row, 1)]
            plgpu.copy_smem_to_gmem(source, window(row, n * _PIECE, 1), commit_group=False)

    for n in range(x.shape[1] // _PIECE):
        piece = x[:, n * _PIECE : (n + 1) * _PIECE]
        # One group of copies a piece, empty or not: a buffer is free when all but the last group
        # have left, and all of the tile before.
        plgpu.wait_smem_to_gmem(min(n, 1), wait_read_only=True)
        inside = right > n * _PIECE
        pl.when(inside & whole)(functools.partial(write_whole, n, piece))
        pl.when(inside & jnp.logical_not(whole))(functools.partial(write_rows, n, piece))
        plgpu.commit_smem_to_gmem_group()
