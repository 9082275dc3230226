"""Softmax attention of one query a row over pages on Hopper, in Pallas on Mosaic GPU.

A block of threads serves the queries that share a KV head over one part of their row's tokens: TMA
brings its pages in, two blocks of keys ahead, and each is read once. What comes out is the part's
attention and the logarithm of its weights' sum, by which XLA puts the parts together. A row is
cut by its own length, so that a long one among short ones keeps as many multiprocessors busy.

Source: Flash-Decoding (Dao et al., https://pytorch.org/blog/flash-decoding/).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import LOG2E, MATRIX, ROW, Ref, tiled
from kernels_pallas.paged_attention.mosaic_gpu import why_not_heads

# Rows of a matrix product, most of them empty: the queries of a KV head are fewer.
_QUERIES = 64
# Keys that are multiplied at a time, and how many such blocks are in flight: with two of them three
# blocks of threads share a multiprocessor, with three two do.
_KEYS, _STAGES = 64, 2
# Least keys of a part, in blocks, and most parts of all rows and KV heads together: enough to fill
# a GPU, few enough that those which find nothing to do cost little.
_LEAST_BLOCKS, _MOST_PARTS = 8, 8192
_PARAMS = plgpu.CompilerParams(approx_math=True)

type _Scalar = Any  # The scalars inside a kernel have no public type.
type _Shaped = jax.Array | jax.ShapeDtypeStruct


def why_not(q: _Shaped, keys: _Shaped) -> str | None:
    """Why the kernel cannot take queries [B, 1, H, K] and pages [N, P, G, page size, K]."""
    groups, size = keys.shape[2:4]
    if reason := why_not_heads(q, keys):
        return reason
    if size % 8 or (_KEYS % size and size % _KEYS):
        return f"it needs pages of 8, 16, 32 or a multiple of {_KEYS} tokens; got {size}"
    if q.shape[2] // groups > _QUERIES:
        return f"it takes {_QUERIES} queries a KV head; got {q.shape[2] // groups}"
    return None


def paged_attention_step_mosaic_gpu(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    index: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """`paged_attention` of one query a row on Hopper; see the public function."""
    batch, _, heads, dim = q.shape
    _, _, groups, size, _ = keys.shape
    capacity = table.shape[1] * size
    share = heads // groups
    # TMA moves whole tiles of eight rows.
    rows = -(-share // 8) * 8
    grouped = q.reshape(batch, groups, share, dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, rows - share), (0, 0)))
    seen = jnp.where(index[:, 0] < capacity, index[:, 0] + 1, 0)
    parts = max(min(-(-capacity // (_LEAST_BLOCKS * _KEYS)), _MOST_PARTS // (batch * groups)), 1)
    blocks = -(-seen // _KEYS)
    span = blocks_of_a_part(blocks, parts)
    out, log_sum = _partial(grouped, keys, values, table, seen, span, layer, parts)
    # Nothing is written where a row has no tokens.
    begin = jnp.arange(parts, dtype=jnp.int32)[None] * span[:, None]
    there = (begin < blocks[:, None])[:, :, None, None]
    if parts > 1:
        weights = jax.nn.softmax(jnp.where(there, log_sum, -jnp.inf), axis=1)
        out = weights[..., None] * out.astype(jnp.float32)
    out = jnp.where(there[..., None], out, 0).sum(axis=1)
    return out[:, :, :share].reshape(q.shape).astype(q.dtype)


def blocks_of_a_part(blocks: Any, parts: int) -> Any:
    """Blocks of keys of each part of a row that has so many, at most `parts` of them."""
    least = _LEAST_BLOCKS
    return jnp.maximum((blocks + least * parts - 1) // (least * parts), 1) * least


def _partial(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    seen: jax.Array,
    span: jax.Array,
    layer: jax.Array,
    parts: int,
) -> tuple[jax.Array, jax.Array]:
    """Each part's attention and the logarithm of the sum of its weights.

    Args:
      q: [B, G, R, K], R a multiple of eight.
      keys: [N, P, G, page size, K].
      values: [N, P, G, page size, K].
      table: [B, W].
      seen: Tokens that a row's query sees [B].
      span: Blocks of keys of each of a row's parts [B].
      layer: [].
      parts: Most of a row.

    Returns:
      [B, parts, G, R, K] in q.dtype and [B, parts, G, R] float32; nothing is written to those that
      a row has no tokens for.
    """
    batch, groups, rows, dim = q.shape
    pages, size = keys.shape[1], keys.shape[3]
    copied = min(size, _KEYS)

    def body(*refs: Ref) -> None:
        q_ref, k_ref, v_ref, table_ref, seen_ref, span_ref, layer_ref, *rest = refs
        out_ref, sum_ref, *scratch = rest
        q_tile, k_tiles, v_tiles, sum_tile, q_loaded, k_loaded, v_loaded = scratch
        row, group, part = (lax.axis_index(name) for name in ("row", "group", "part"))
        tokens, span = seen_ref[row], span_ref[row]
        begin = part * span
        blocks = lax.div(tokens + (_KEYS - 1), jnp.int32(_KEYS))
        end = jnp.minimum(begin + span, blocks)

        def stage_of(n: _Scalar) -> _Scalar:
            return lax.rem(n - begin, jnp.int32(_STAGES))

        def pages_of(n: _Scalar) -> list[_Scalar]:
            """Where block n's keys begin in the pools of pages."""
            return [
                (layer_ref[0] * pages + table_ref[row, lax.div(n * _KEYS + first, jnp.int32(size))])
                * groups
                + group
                for first in range(0, _KEYS, copied)
            ]

        def copy(ref: Ref, tiles: Ref, loaded: Ref, n: _Scalar, where: list[_Scalar]) -> None:
            for i, page in enumerate(where):
                inside = lax.rem(n * _KEYS + i * copied, jnp.int32(size))
                source = ref.at[page, pl.ds(pl.multiple_of(inside, copied), copied)]
                into = tiles.at[stage_of(n), pl.ds(i * copied, copied)]
                plgpu.copy_gmem_to_smem(source, into, loaded.at[stage_of(n)])

        @pl.when(begin < end)
        def _attend() -> None:
            plgpu.copy_gmem_to_smem(q_ref.at[row, group], q_tile.at[pl.ds(0, rows)], q_loaded)
            for ahead in range(_STAGES):

                @pl.when(begin + ahead < end)
                def _first(n: _Scalar = begin + ahead) -> None:
                    where = pages_of(n)
                    copy(k_ref, k_tiles, k_loaded, n, where)
                    copy(v_ref, v_tiles, v_loaded, n, where)

            plgpu.barrier_wait(q_loaded)

            def block(n: _Scalar, carry: tuple[jax.Array, ...], masked: bool) -> Any:
                acc, top, total, *where = carry
                stage = stage_of(n)
                more = n + _STAGES < end
                # A step before they are wanted, as the table lies in global memory.
                later = pages_of(jnp.minimum(n + _STAGES + 1, end - 1))
                plgpu.barrier_wait(k_loaded.at[stage])

                def score(acc_ref: Ref) -> jax.Array:
                    plgpu.wgmma(acc_ref, q_tile, k_tiles.at[stage].transpose((1, 0)))
                    return acc_ref[...]

                shape = (_QUERIES, _KEYS)
                scores = pl.run_scoped(score, plgpu.ACC(shape, jnp.float32))
                # All warps have to be done with a stage before it is written again.
                plgpu.commit_smem()
                pl.when(more)(lambda: copy(k_ref, k_tiles, k_loaded, n + _STAGES, where))
                if masked:
                    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
                    scores = jnp.where(key + n * _KEYS < tokens, scores, -jnp.inf)
                new_top = jnp.maximum(top, scores.max(axis=1) * scale)
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_top, shape, [0]))
                acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
                total = total * shrink + weights.sum(axis=1)
                plgpu.barrier_wait(v_loaded.at[stage])

                def weigh(acc_ref: Ref) -> None:
                    plgpu.wgmma(acc_ref, weights.astype(jnp.bfloat16), v_tiles.at[stage])

                acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
                plgpu.commit_smem()
                pl.when(more)(lambda: copy(v_ref, v_tiles, v_loaded, n + _STAGES, where))
                return acc, new_top, total, *later

            def vector(value: float) -> jax.Array:
                return plgpu.layout_cast(jnp.full((_QUERIES,), value, jnp.float32), ROW)

            zeros = plgpu.layout_cast(jnp.zeros((_QUERIES, dim), jnp.float32), MATRIX)
            later = pages_of(jnp.minimum(begin + _STAGES, end - 1))
            carry = (zeros, vector(-jnp.inf), vector(0.0), *later)
            whole = jnp.minimum(lax.div(tokens, jnp.int32(_KEYS)), end)
            carry = lax.fori_loop(begin, whole, functools.partial(block, masked=False), carry)
            carry = lax.fori_loop(whole, end, functools.partial(block, masked=True), carry)
            acc, top, total, *_ = carry
            acc /= lax.broadcast_in_dim(total, acc.shape, [0])
            q_tile[...] = acc.astype(jnp.bfloat16)
            sum_tile[...] = (top + jnp.log2(total)) / LOG2E
            plgpu.commit_smem()
            real = pl.ds(0, rows)
            plgpu.copy_smem_to_gmem(q_tile.at[real], out_ref.at[row, part, group])
            plgpu.copy_smem_to_gmem(sum_tile.at[real], sum_ref.at[row, part, group])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scale = LOG2E * dim**-0.5
    stages = plgpu.SMEM((_STAGES, _KEYS, dim), jnp.bfloat16, transforms=tiled(2))
    loads = plgpu.Barrier(num_arrivals=_KEYS // copied, num_barriers=_STAGES)
    run = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, parts, groups, rows, dim), q.dtype),
            jax.ShapeDtypeStruct((batch, parts, groups, rows), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((_QUERIES, dim), jnp.bfloat16, transforms=tiled(2)),
            stages,
            stages,
            plgpu.SMEM((_QUERIES,), jnp.float32),
            plgpu.Barrier(),
            loads,
            loads,
        ),
        grid=(parts, groups, batch),
        grid_names=("part", "group", "row"),
        num_threads=1,
        thread_name="warp_group",
        compiler_params=_PARAMS,
    )
    pools = (x.reshape(-1, size, dim) for x in (keys, values))
    return run(q, *pools, table, seen, span, layer[None])
