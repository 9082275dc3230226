"""Softmax attention of a prefill over pages on Hopper, in Pallas on Mosaic GPU.

A block of threads serves 128 queries of one head: one warp group brings pages in by TMA as the
table names them, two multiply 64 queries each and take turns at the tensor cores, so that the
softmax of one runs beside the products of the other. Keys are read up to the last one that the
block's queries see, however long the table is.

Source: FlashAttention-3 (arXiv 2407.08608), section 3; the schedule follows
jax/experimental/pallas/ops/gpu/attention_mgpu.py.
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

# Queries of a warp group, and warp groups of a block of threads that multiply.
_QUERIES, _WORKERS = 64, 2
# Keys that are multiplied at a time, and how many such blocks are in flight.
_KEYS, _STAGES = 128, 2
_LOADER_REGISTERS, _WORKER_REGISTERS = 40, 232
_PARAMS = plgpu.CompilerParams(approx_math=True)

type _Scalar = Any  # The scalars inside a kernel have no public type.
type _Shaped = jax.Array | jax.ShapeDtypeStruct


def why_not(q: _Shaped, keys: _Shaped) -> str | None:
    """Why the kernel cannot take queries [B, T, H, K] and pages [N, P, G, page size, K]."""
    size = keys.shape[3]
    if reason := why_not_heads(q, keys):
        return reason
    if _KEYS % size or size % 8:
        return f"it needs pages of 8 to {_KEYS} tokens, a power of two; got {size}"
    if q.shape[1] % (_WORKERS * _QUERIES):
        return f"it needs queries in multiples of {_WORKERS * _QUERIES}; got {q.shape[1]}"
    return None


def why_not_heads(q: _Shaped, keys: _Shaped) -> str | None:
    """Why no kernel over pages for Hopper can take them; None where one may."""
    if q.dtype != jnp.bfloat16 or keys.dtype != jnp.bfloat16:
        return f"it takes bfloat16; got {q.dtype} and {keys.dtype}"
    if keys.shape[4] not in (64, 128):
        return f"it needs heads of 64 or 128; got {keys.shape[4]}"
    return None


def paged_attention_mosaic_gpu(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    index: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """`paged_attention` on Hopper; see the public function."""
    batch, length, heads, dim = q.shape
    _, pages, groups, size, _ = keys.shape
    width = table.shape[1]
    steps = _KEYS // size
    scale = LOG2E * dim**-0.5

    def body(*refs: Ref) -> None:
        q_ref, k_ref, v_ref, table_ref, first_ref, layer_ref, out_ref, *scratch = refs
        q_tiles, k_tiles, v_tiles, q_loaded, k_loaded, v_loaded, k_free, v_free, turn = scratch
        row, head = lax.axis_index("row"), lax.axis_index("head")
        first = first_ref[row]
        # The last queries see the most and start first.
        tile = lax.axis_size("queries") - 1 - lax.axis_index("queries")
        warp_group = lax.axis_index("warp_group")

        def blocks(query: _Scalar) -> _Scalar:
            """Blocks of keys that hold those before place `query` of the tokens."""
            return lax.div(first + query + _KEYS - 1, jnp.int32(_KEYS))

        all_blocks = blocks((tile + 1) * (_WORKERS * _QUERIES))

        def stage_of(n: _Scalar) -> _Scalar:
            return lax.rem(n, jnp.int32(_STAGES))

        @pl.when(warp_group == _WORKERS)
        def _load() -> None:
            plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
            group = lax.div(head, jnp.int32(heads // groups))

            def copy(ref: Ref, tiles: Ref, loaded: Ref, n: _Scalar) -> None:
                for step in range(steps):
                    # Past the table no query looks, but a copy has to read somewhere.
                    place = jnp.minimum(n * steps + step, width - 1)
                    page = (layer_ref[0] * pages + table_ref[row, place]) * groups + group
                    into = tiles.at[stage_of(n), pl.ds(step * size, size)]
                    plgpu.copy_gmem_to_smem(ref.at[page], into, loaded.at[stage_of(n)])

            @pl.loop(0, all_blocks)
            def _block(n: _Scalar) -> None:
                for ref, tiles, loaded, free in (
                    (k_ref, k_tiles, k_loaded, k_free),
                    (v_ref, v_tiles, v_loaded, v_free),
                ):
                    pl.when(n >= _STAGES)(
                        functools.partial(plgpu.barrier_wait, free.at[stage_of(n)])
                    )
                    copy(ref, tiles, loaded, n)

        @pl.when(warp_group < _WORKERS)
        def _attend() -> None:
            plgpu.set_max_registers(_WORKER_REGISTERS, action="increase")
            q_tile = q_tiles.at[warp_group]
            start = tile * (_WORKERS * _QUERIES) + warp_group * _QUERIES
            window = pl.ds(pl.multiple_of(start, _QUERIES), _QUERIES)
            plgpu.copy_gmem_to_smem(q_ref.at[row, window, head], q_tile, q_loaded.at[warp_group])
            plgpu.barrier_wait(q_loaded.at[warp_group])
            seen = blocks(start + _QUERIES)
            whole = lax.div(first + start + 1, jnp.int32(_KEYS))

            def take_turn() -> None:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def block(n: _Scalar, carry: tuple[jax.Array, ...], masked: bool) -> Any:
                acc, top, total = carry
                stage = stage_of(n)

                def score(acc_ref: Ref) -> jax.Array:
                    plgpu.wgmma(acc_ref, q_tile, k_tiles.at[stage].transpose((1, 0)))
                    take_turn()
                    return acc_ref[...]

                shape = (_QUERIES, _KEYS)
                scores = pl.run_scoped(score, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(k_free.at[stage])
                if masked:
                    query, key = (
                        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)
                        for axis in (0, 1)
                    )
                    sees = query + (first + start) >= key + n * _KEYS
                    scores = jnp.where(sees, scores, -jnp.inf)
                new_top = jnp.maximum(top, scores.max(axis=1) * scale)
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_top, shape, [0]))
                acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
                total = total * shrink + weights.sum(axis=1)
                rounded = weights.astype(jnp.bfloat16)
                # All of the softmax before the other warp group gets its turn at it.
                acc, total, new_top, rounded = lax.optimization_barrier(
                    (acc, total, new_top, rounded)
                )
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_loaded.at[stage])
                plgpu.barrier_wait(turn)

                def weigh(acc_ref: Ref) -> None:
                    plgpu.wgmma(acc_ref, rounded, v_tiles.at[stage])
                    pl.when(n + 1 < seen)(lambda: plgpu.barrier_wait(k_loaded.at[stage_of(n + 1)]))

                acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[stage])
                return acc, new_top, total

            def vector(value: float) -> jax.Array:
                return plgpu.layout_cast(jnp.full((_QUERIES,), value, jnp.float32), ROW)

            zeros = plgpu.layout_cast(jnp.zeros((_QUERIES, dim), jnp.float32), MATRIX)
            carry = (zeros, vector(-jnp.inf), vector(0.0))
            plgpu.barrier_wait(k_loaded.at[0])
            pl.when(warp_group == 1)(take_turn)
            carry = lax.fori_loop(0, whole, functools.partial(block, masked=False), carry)
            carry = lax.fori_loop(whole, seen, functools.partial(block, masked=True), carry)

            @pl.loop(seen, all_blocks)
            def _flush(n: _Scalar) -> None:
                # What this warp group does not see the other one does, and waits for both.
                plgpu.barrier_arrive(k_free.at[stage_of(n)])
                plgpu.barrier_arrive(v_free.at[stage_of(n)])
                take_turn()
                take_turn()

            pl.when(warp_group == 0)(take_turn)
            acc, _, total = carry
            acc /= lax.broadcast_in_dim(total, acc.shape, [0])
            q_tile[...] = acc.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[row, window, head])
            plgpu.wait_smem_to_gmem(0)

    def in_stages(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled(2))

    def barriers(arrivals: int, count: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    tiles = (_STAGES, _KEYS, dim)
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            in_stages(_WORKERS, _QUERIES, dim),
            in_stages(*tiles),
            in_stages(*tiles),
            barriers(1, _WORKERS),
            barriers(steps, _STAGES),
            barriers(steps, _STAGES),
            barriers(_WORKERS, _STAGES),
            barriers(_WORKERS, _STAGES),
            barriers(_WORKERS, 1),
        ),
        grid=(heads, length // (_WORKERS * _QUERIES), batch),
        grid_names=("head", "queries", "row"),
        num_threads=_WORKERS + 1,
        thread_name="warp_group",
        compiler_params=_PARAMS,
    )
    pools = (x.reshape(-1, size, dim) for x in (keys, values))
    capacity = width * size
    # A row of padding has no first token; whatever it reads is not kept.
    first = jnp.where(index[:, 0] < capacity, index[:, 0], 0)
    out = run(q, *pools, table, first, layer[None])
    return jnp.where((index < capacity)[:, :, None, None], out, 0)
