"""Grouped matrix product in plain XLA: blocks of rows that belong to one group each."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.numerics import einsum32

BLOCK = 64
# Up to this many elements of gathered weights, one batched product over all blocks beats XLA's
# own ragged_dot, which on CPUs and NVIDIA GPUs multiplies every row with every group.
_GATHERED_WEIGHTS = 1 << 26


def grouped_matmul_chunked(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, row_align: int
) -> jax.Array:
    """`grouped_matmul` by blocks of rows; see the public function."""
    aligned = row_align > 1
    block = row_align if aligned else BLOCK
    rows, groups = lhs.shape[0], rhs.shape[0]
    blocks = rows // block if aligned else -(-rows // block) + groups
    if blocks * rhs.shape[1] * rhs.shape[2] > _GATHERED_WEIGHTS:
        precision = jax.lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
        return jax.lax.ragged_dot(lhs, rhs, group_sizes, precision=precision)
    owner, source = block_layout(group_sizes, blocks, block)
    if aligned:
        return _blocks_matmul(lhs.reshape(blocks, block, -1), rhs, owner).reshape(rows, -1)
    # Rows past their group's end read nothing and are written nowhere.
    source = jnp.where(source < 0, rows, source)
    out = _blocks_matmul(lhs.at[source].get(mode="fill", fill_value=0), rhs, owner)
    return jnp.zeros((rows, rhs.shape[2]), lhs.dtype).at[source].set(out, mode="drop")


def block_layout(group_sizes: jax.Array, blocks: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Lays groups out in whole blocks of rows, group after group.

    Args:
      group_sizes: [E] int32.
      blocks: Number of blocks, at least sum(ceil(group_sizes / block)).
      block: Rows a block.

    Returns:
      owner [blocks]: the group of each block, E for a block past the last group; and
      source [blocks, block]: the row (in group-sorted order) that stands there, -1 for none.
    """
    block_ends = jnp.cumsum((group_sizes + block - 1) // block)
    index = jnp.arange(blocks, dtype=jnp.int32)
    owner = jnp.searchsorted(block_ends, index, side="right").astype(jnp.int32)
    sizes = jnp.pad(group_sizes, (0, 1))  # group E is empty
    starts = jnp.cumsum(sizes) - sizes
    first_block = jnp.concatenate([jnp.zeros(1, block_ends.dtype), block_ends])
    row = (index - first_block[owner])[:, None] * block + jnp.arange(block, dtype=jnp.int32)[None]
    return owner, jnp.where(row < sizes[owner][:, None], row + starts[owner][:, None], -1)


def _blocks_matmul(x: jax.Array, rhs: jax.Array, owner: jax.Array) -> jax.Array:
    """x [blocks, block, K] times the owner's matrix of rhs [E, K, N]; E owns zeros."""
    # Choosing by a one-hot product keeps the transpose of this choice a product as well; the
    # transpose of a gather is a scatter, which XLA runs serially on CPUs.
    chosen = jax.nn.one_hot(owner, rhs.shape[0], dtype=rhs.dtype)
    weights = einsum32("be,ekn->bkn", chosen, rhs, rhs.dtype).astype(rhs.dtype)
    return einsum32("bik,bkn->bin", x, weights, x.dtype).astype(x.dtype)
