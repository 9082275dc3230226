"""One token of lightning attention on Hopper, in place on a pool of states.

A block of threads serves some columns of one head of one row: TMA brings their state into shared
memory in parts, and each part goes back as soon as it is updated. The pool is read and written
once. `gated_lightning_step` has it take the layer's projection as it lies, and SiLU in passing; a
second kernel makes the norm and the gate, for which all heads of a row have to be there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import COLUMN, LOG2E, MATRIX, ROW, Ref, tiled
from kernels_pallas.row_norm.mosaic_gpu import gated_row_norm_mosaic_gpu

_PART = 64  # Rows of the state that are brought at a time, the least that a warp group holds.
_COLUMNS = 64  # Columns of the state a block of threads: six such blocks share a multiprocessor.
_QUERY, _KEY, _VALUE = range(3)


def why_not(key_dim: int, value_dim: int) -> str | None:
    """Why the kernel cannot take heads of these sizes; None where it can."""
    if key_dim % _PART or value_dim % _COLUMNS:
        return f"it needs K and V in multiples of {_PART}; got K = {key_dim}, V = {value_dim}"
    return None


@jax.jit
def lightning_attention_step_mosaic_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    state: jax.Array,
    slots: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`lightning_attention_step` with a table of slots, all of it given.

    Args:
      q: Queries [B, H, K].
      k: Keys [B, H, K].
      v: Values [B, H, V].
      decay: s [H] float32.
      state: Pool [N, H, K, V] float32; updated in place where the caller donates it.
      slots: [B] int32, the pool entry of each row; negative for a row that is idle.

    Returns:
      out [B, H, V] in v.dtype, zeros for idle rows, and the pool.
    """

    def body(q_ref: Ref, k_ref: Ref, v_ref: Ref, *refs: Ref) -> None:
        row, head = lax.axis_index("row"), lax.axis_index("head")

        def vector(which: int, first: Any, size: int, layout: Any) -> jax.Array:
            ref = (q_ref, k_ref, v_ref)[which].at[row, head, pl.ds(first, size)]
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        _step(_Row(vector), *refs)

    rows = jax.ShapeDtypeStruct((*q.shape[:2], v.shape[-1]), v.dtype)
    return _call(body, (q, k, v), decay, slots, state, rows)


@functools.partial(jax.jit, static_argnames=("eps", "row_align"))
def gated_lightning_step_mosaic_gpu(
    projected: jax.Array,
    decay: jax.Array,
    scale: jax.Array,
    state: jax.Array,
    slots: jax.Array,
    layer: jax.Array,
    *,
    eps: float,
    row_align: int,
) -> tuple[jax.Array, jax.Array]:
    """`gated_lightning_step`. Shapes as in the public function."""
    heads, dim = state.shape[2:4]

    def body(projected_ref: Ref, layer_ref: Ref, *refs: Ref) -> None:
        row, head = lax.axis_index("row"), lax.axis_index("head")

        def vector(which: int, first: Any, size: int, layout: Any) -> jax.Array:
            ref = projected_ref.at[row, pl.ds((3 * head + which) * dim + first, size)]
            x = plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
            return (x / (1 + jnp.exp2(-LOG2E * x))).astype(projected.dtype).astype(jnp.float32)

        _step(_Row(vector, (layer_ref[0],)), *refs)

    rows = jax.ShapeDtypeStruct((slots.size, heads, dim), projected.dtype)
    out, state = _call(body, (projected, layer[None]), decay, slots, state, rows)
    out = out.reshape(len(out), -1)
    return gated_row_norm_mosaic_gpu(out, projected, scale, eps, row_align=row_align), state


class _Row(NamedTuple):
    """What a block of threads works on.

    vector(which, first, size, layout): part of the float32 query, key or value; pool: where in the
    pool its entries begin.
    """

    vector: Callable[[int, Any, int, Any], jax.Array]
    pool: tuple[Any, ...] = ()


def _call(
    body: Callable[..., None],
    operands: tuple[jax.Array, ...],
    decay: jax.Array,
    slots: jax.Array,
    state: jax.Array,
    rows: jax.ShapeDtypeStruct,
) -> tuple[jax.Array, jax.Array]:
    """The outputs `rows` [B, H, V] and the pool after body(*operands, decay, slots, pool, out,
    *scratch).
    """
    batch, heads, value_dim = rows.shape
    key_dim = state.shape[-2]
    pool = jax.new_ref(state)

    def in_scratch(*refs: Ref) -> None:
        pl.run_scoped(
            functools.partial(body, *refs),
            plgpu.SMEM((key_dim // _PART, _PART, _COLUMNS), jnp.float32, transforms=tiled(4)),
            plgpu.SMEM((_COLUMNS,), rows.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=key_dim // _PART),
            collective_axes="warp_group",
        )

    out = pl.kernel(
        in_scratch,
        out_type=rows,
        mesh=plgpu.Mesh(
            grid=(value_dim // _COLUMNS, heads, batch),
            grid_names=("columns", "head", "row"),
            num_threads=1,
            thread_name="warp_group",
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=4 * _COLUMNS * 4,
        ),
        name="lightning_attention_step",
    )(*operands, decay, slots, pool)
    return out, jax.freeze(pool)


def _step(
    of: _Row,
    decay_ref: Ref,
    slots_ref: Ref,
    pool_ref: Ref,
    out_ref: Ref,
    parts_smem: Ref,
    out_smem: Ref,
    loaded: Ref,
) -> None:
    head, row = lax.axis_index("head"), lax.axis_index("row")
    slot = slots_ref[row]
    parts, _, size = parts_smem.shape
    column = lax.axis_index("columns") * size
    columns = pl.ds(column, size)

    def write(out: jax.Array) -> None:
        out_smem[...] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, head, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    zeros = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), COLUMN)
    pl.when(slot < 0)(lambda: write(zeros))

    @pl.when(slot >= 0)
    def _active() -> None:
        def rows(part: int) -> Ref:
            return pool_ref.at[(*of.pool, slot, head, pl.ds(part * _PART, _PART), columns)]

        for part in range(parts):
            plgpu.copy_gmem_to_smem(rows(part), parts_smem.at[part], loaded.at[part])
        keep = jnp.exp2(-LOG2E * decay_ref[head])
        v = of.vector(_VALUE, column, size, COLUMN)
        shape = (_PART, size)
        out = zeros
        for part in range(parts):
            q, k = (of.vector(which, part * _PART, _PART, ROW) for which in (_QUERY, _KEY))
            plgpu.barrier_wait(loaded.at[part])
            state = plgpu.load(parts_smem.at[part], layout=MATRIX)
            state = keep * state + lax.broadcast_in_dim(k, shape, [0]) * lax.broadcast_in_dim(
                v, shape, [1]
            )
            parts_smem.at[part][...] = state
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(parts_smem.at[part], rows(part))
            out += jnp.sum(lax.broadcast_in_dim(q, shape, [0]) * state, axis=0)
        write(out)
