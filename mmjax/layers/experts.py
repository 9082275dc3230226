"""Experts on the tokens of one device: sorted by expert, or every expert on every token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, grouped_matmul, grouped_swiglu, listed_ffn
from kernels_pallas.grouped_matmul import LISTED_ROWS, gains_by_align
from kernels_pallas.numerics import einsum32, product
from mmjax.layers.int8 import Int8Matrices

# Rows that share one expert's matrix in the grouped product, at least and at most.
MIN_BLOCK, MAX_BLOCK = 64, 512
# Token-slots whose turns are counted at once.
_COUNTED = 256
# Values in a row of a TPU's tile.
_LANES = 128


class Weights(NamedTuple):
    """w1, w3 [E, D, F]; w2 [E, F, D]."""

    w1: jax.Array | Int8Matrices
    w3: jax.Array | Int8Matrices
    w2: jax.Array | Int8Matrices


def apply_experts(
    tokens: jax.Array, share: jax.Array, expert: jax.Array, kernels: Weights
) -> jax.Array:
    """Σ_k share_k · expert_k(token); a visit to expert E adds nothing.

    Args:
      tokens: [N, D], or more rows, of which the first N count.
      share: [N, k].
      expert: [N, k] int32, 0 to E.
      kernels: In any dtype; the products are in that of the tokens.

    Returns:
      [N, D] in tokens.dtype.
    """
    experts, visits = kernels.w1.shape[0], expert.size
    block = _block_size(tokens, visits, kernels)
    # XLA reads bytes in its products; the kernels would have them written out before.
    reads_bytes = isinstance(kernels.w1, Int8Matrices)
    few = block == 1 and share.shape[0] <= LISTED_ROWS
    if few and not reads_bytes:
        return _visited_experts(tokens, share, expert, kernels)
    tokens = tokens[: share.shape[0]]
    if few:
        return _every_expert(tokens, share, expert, kernels)
    if block > 1 and tokens.shape[0] * experts <= _row_count(visits, experts, block):
        return _every_expert(tokens, share, expert, kernels)
    if dispatch.target(tokens).platform == "gpu" and block == 1:
        return _weighted_visits(tokens, share, expert, kernels)
    out = visit_experts(tokens, expert, kernels)  # [N, k, D]
    return weighted_sum(out, share).astype(tokens.dtype)


def visit_experts(tokens: jax.Array, expert: jax.Array, kernels: Weights) -> jax.Array:
    """The output of each visit [N, k, D] by tokens [N, D] to expert [N, k]; zero for expert E."""
    block = _block_size(tokens, expert.size, kernels)
    sizes, rows = _sort_by_expert(expert, kernels.w1.shape[0], block)
    return return_rows(_ffn(take_rows(tokens, rows), sizes, kernels, block), rows)


def _weighted_visits(
    tokens: jax.Array, share: jax.Array, expert: jax.Array, kernels: Weights
) -> jax.Array:
    """Σ_k share_k · expert_k(token), the share taken into the row before the last product: no
    gradient then needs the outputs of the visits, k times the stream.
    """
    sizes, rows = _sort_by_expert(expert, kernels.w1.shape[0], 1)
    each = Rows(rows.source, rows.slot.reshape(-1, 1))
    weight = take_rows(share.reshape(-1, 1), each)
    out = _ffn(take_rows(tokens, rows), sizes, kernels, 1, weight)
    return sum_rows(out, rows)


def weighted_sum(out: jax.Array, share: jax.Array) -> jax.Array:
    """Σ_k share [N, k] · out [N, k, D], in float32."""
    return (out.astype(jnp.float32) * share.astype(jnp.float32)[:, :, None]).sum(1)


def _ffn(
    rows: jax.Array,
    group_sizes: jax.Array,
    kernels: Weights,
    row_align: int,
    row_weights: jax.Array | None = None,
) -> jax.Array:
    """w2(silu(w1 x) · w3 x) of rows [R, D] in groups of one expert each, times their weights."""
    w1, w3, w2 = (w.astype(rows.dtype) for w in kernels)
    hidden = grouped_swiglu(rows, w1, w3, group_sizes, row_weights=row_weights, row_align=row_align)
    out = grouped_matmul(hidden, w2, group_sizes, row_align=row_align)
    return product(out) if row_weights is None else out


def _every_expert(
    tokens: jax.Array, share: jax.Array, expert: jax.Array, kernels: Weights
) -> jax.Array:
    """All experts on all tokens: no sorting, and each matrix is read where and as it lies.

    One product over all experts would have XLA lay w1 and w3 out anew on CPUs, at every step, and
    its gradient take three times as long.
    """
    dtype = tokens.dtype
    experts = kernels.w1.shape[0]
    chosen = jax.nn.one_hot(expert, experts, dtype=dtype)  # [N, k, E]
    weight = (share[:, :, None] * chosen).sum(1).T  # [E, N]
    each = jnp.broadcast_to(tokens[None], (experts, *tokens.shape))

    def multiply(x: jax.Array, kernel: jax.Array | Int8Matrices) -> jax.Array:
        if isinstance(kernel, Int8Matrices):
            return einsum32("enk,ekm->enm", x, kernel.values, dtype) * kernel.scale
        return einsum32("enk,ekm->enm", x, kernel, dtype)

    gate, up = (product(multiply(each, w).astype(dtype)) for w in (kernels.w1, kernels.w3))
    hidden = jax.nn.silu(gate) * up * weight[:, :, None]
    return multiply(hidden, kernels.w2).sum(0).astype(dtype)


def _visited_experts(
    tokens: jax.Array, share: jax.Array, expert: jax.Array, kernels: Weights
) -> jax.Array:
    """All tokens through every expert that one of them visits: few as they are, they fit the one
    tile of rows that a kernel multiplies with an expert anyway, and nothing has to be sorted.
    """
    weight, turns = _turns(share, expert, kernels.w1.shape[0])
    w1, w3, w2 = (w.astype(tokens.dtype) for w in kernels)
    out = listed_ffn(tokens, w1, w3, w2, turns)[:, : share.shape[0]]
    return (weight[:, :, None] * out.astype(jnp.float32)).sum(0).astype(tokens.dtype)


def _turns(share: jax.Array, expert: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The visited experts [T], T = min(E, N k), E for none; and the float32 weight [T, N] of the
    output of each.
    """
    if expert.shape[0] == 1:
        return share.T.astype(jnp.float32), expert[0]
    index = jnp.arange(experts, dtype=expert.dtype)
    chosen = expert[:, :, None] == index[None, None]  # [N, k, E]
    weight = jnp.where(chosen, share[:, :, None].astype(jnp.float32), 0).sum(1)  # [N, E]
    visited = chosen.any((0, 1))
    # A sum through a mask, where a cumsum and a scatter are a chain of kernels.
    before = (visited[None] & (index[None] < index[:, None])).sum(1, dtype=jnp.int32)
    turn = jnp.arange(min(experts, expert.size), dtype=jnp.int32)
    at_turn = visited[None] & (turn[:, None] == before[None])  # [T, E]
    # 0 where no expert is left, hence one more.
    turns = jnp.where(at_turn, index[None] + 1, 0).sum(1, dtype=jnp.int32) - 1
    turns = jnp.where(turns < 0, experts, turns)
    return jnp.where(at_turn[:, None], weight[None], 0).sum(2), turns


def _block_size(tokens: jax.Array, visits: int, kernels: Weights) -> int:
    """What an expert's rows are rounded up to: nothing for the Pallas kernels; for XLA a power of
    two, at most a quarter of an average expert's rows, within bounds.
    """
    dtype = tokens.dtype
    into, back = (jax.ShapeDtypeStruct(w.shape, dtype) for w in (kernels.w1, kernels.w2))
    hidden = jax.ShapeDtypeStruct((visits, into.shape[2]), dtype)
    if not (gains_by_align(tokens, into) or gains_by_align(hidden, back)):
        return 1
    wanted = 1 << max(visits // into.shape[0] // 4, 1).bit_length() - 1
    return min(max(wanted, MIN_BLOCK), MAX_BLOCK)


def _row_count(visits: int, experts: int, block: int) -> int:
    """Rows that hold the visits however they fall, each expert's in blocks of its own."""
    return visits if block == 1 else (-(-visits // block) + experts) * block


class Rows(NamedTuple):
    """Where token-slots stand among R rows.

    source [R]: the token-slot n·k + j in each row, N·k where none; slot [N, k]: the row of each
    token-slot, R where none.
    """

    source: jax.Array
    slot: jax.Array


def _sort_by_expert(expert: jax.Array, experts: int, block: int) -> tuple[jax.Array, Rows]:
    """Rows sorted by expert in whole blocks, and each expert's rows rounded up to blocks [E]."""
    flat = expert.reshape(-1)
    place, sizes = turns(flat, experts)
    sizes = (sizes + block - 1) // block * block
    count = _row_count(flat.size, experts, block)
    slot = jnp.where(place < 0, count, _at(jnp.cumsum(sizes) - sizes, flat) + place)
    # Kept like a product, for they take many small kernels and little room.
    rows = Rows(product(inverse(slot, count)), product(slot.reshape(expert.shape)))
    return product(sizes), rows


def turns(group: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """How many before it are of the same group [S], -1 in `groups`; size of each group.

    Counted, where sorting would take the work of log² S passes on a TPU, and XLA 10 seconds to
    compile for S = 65,536: within a block by a product with a triangle of ones, which is exact in
    any precision, then over the blocks.
    """
    count = group.size
    block = min(_COUNTED, count)
    member = jnp.pad(group, (0, -count % block), constant_values=groups).reshape(-1, block)
    member = (
        member[:, :, None] == jnp.arange(groups, dtype=group.dtype)[None, None]
    )  # [S / C, C, G]
    ones = member.astype(jnp.float32)
    earlier = jnp.tril(jnp.ones((block, block), jnp.float32), -1)
    within = jnp.einsum("ij,njg->nig", earlier, ones).astype(jnp.int32)
    sizes = member.sum(1, dtype=jnp.int32)
    before = jnp.cumsum(sizes, axis=0) - sizes
    place = jnp.where(member, within + before[:, None], 0).sum(2).reshape(-1)[:count]
    return jnp.where(group < groups, place, -1), sizes.sum(0)


def inverse(place: jax.Array, length: int) -> jax.Array:
    """index [length] with index[place[i]] = i for each place in range, place.size elsewhere."""
    index = jnp.full(length, place.size, jnp.int32)
    each = jnp.arange(place.size, dtype=jnp.int32)
    return index.at[place].set(each, mode="drop", unique_indices=True)


# The two moves below are gathers in both directions, because a permutation knows its inverse;
# XLA's transpose of a gather is a scatter-add, serial on CPUs and atomic on GPUs.
@jax.custom_vjp
def take_rows(tokens: jax.Array, rows: Rows) -> jax.Array:
    """Tokens [N, D] to rows [R, D]; rows without a token are zero."""
    return _at(tokens, rows.source // rows.slot.shape[1])


def _take_rows_forward(tokens: jax.Array, rows: Rows) -> tuple[jax.Array, Rows]:
    return take_rows(tokens, rows), rows


def _take_rows_backward(rows: Rows, d_rows: jax.Array) -> tuple[jax.Array, None]:
    return _at(d_rows, rows.slot).sum(1), None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def return_rows(x: jax.Array, rows: Rows) -> jax.Array:
    """Rows [R, D] back to token-slots [N, k, D]; slots without a row are zero."""
    return _at(x, rows.slot)


def _return_rows_forward(x: jax.Array, rows: Rows) -> tuple[jax.Array, Rows]:
    return return_rows(x, rows), rows


def _return_rows_backward(rows: Rows, d_slots: jax.Array) -> tuple[jax.Array, None]:
    return _at(d_slots.reshape(-1, d_slots.shape[-1]), rows.source), None


return_rows.defvjp(_return_rows_forward, _return_rows_backward)


@jax.custom_vjp
def sum_rows(x: jax.Array, rows: Rows) -> jax.Array:
    """Σ over the rows [R, D] of each token [N, D], in float32; the transpose of `take_rows`."""
    return _at(x, rows.slot).astype(jnp.float32).sum(1).astype(x.dtype)


def _sum_rows_forward(x: jax.Array, rows: Rows) -> tuple[jax.Array, Rows]:
    return sum_rows(x, rows), rows


def _sum_rows_backward(rows: Rows, d_tokens: jax.Array) -> tuple[jax.Array, None]:
    return take_rows(d_tokens, rows), None


sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] along the first axis, zero where the index is out of range."""
    # Each row in tiles of its own: two bfloat16 rows share a TPU's tile, and XLA takes 5 seconds to
    # compile one gather of them, 0.5 of these. Elsewhere this reshapes nothing in memory.
    rows = x.reshape(x.shape[0], -1, _LANES) if x.ndim == 2 and not x.shape[1] % _LANES else x
    out = rows.at[index].get(mode="fill", fill_value=0)
    return out.reshape(*index.shape, *x.shape[1:])
