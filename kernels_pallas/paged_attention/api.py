"""The surface of attention over pages: dispatch, and writing the pages."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Candidate
from kernels_pallas.paged_attention import mosaic_gpu, step_mosaic_gpu
from kernels_pallas.paged_attention.chunked import paged_attention_chunked


def paged_attention(
    q: Float[Array, "B T H K"],
    keys: Float[Array, "N P G S K"],
    values: Float[Array, "N P G S K"],
    table: Int32[Array, "B W"],
    index: Int32[Array, "B T"],
    layer: Int32[Array, ""],
    *,
    implementation: str | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(q kᵀ / sqrt(K)) v over the row's tokens up to each query, with a float32 softmax.

    Args:
      q: Queries [B, T, H, K].
      keys: [N, P, G, page size, K], those of the queries' own tokens among them.
      values: [N, P, G, page size, K].
      table: Pages of each row [B, W].
      index: Place of each query in its row [B, T]; W · page size or more for padding, whose
        output is zero. A row's tokens follow each other from its first query on, padding after.
      layer: Which of the N layers.
      implementation: None for the best one on the arrays' platform, or "chunked" | "mosaic_gpu".

    Returns:
      [B, T, H, K] in q.dtype.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.
    """
    kernel, why_not = (
        (step_mosaic_gpu.paged_attention_step_mosaic_gpu, step_mosaic_gpu.why_not)
        if q.shape[1] == 1
        else (mosaic_gpu.paged_attention_mosaic_gpu, mosaic_gpu.why_not)
    )
    not_gpu = dispatch.target(q, keys).why_not_hopper() or why_not(q, keys)
    candidates: dict[str, Candidate[Callable[..., jax.Array]]] = {
        "mosaic_gpu": Candidate(kernel, not_gpu),
        "chunked": Candidate(paged_attention_chunked),
    }
    run = dispatch.resolve("paged_attention", implementation, candidates)
    return run(q, keys, values, table, index, layer)


def write_pages(
    x: Float[Array, "B T G K"],
    index: Int32[Array, "B T"],
    pool: Float[Array, "N P G S K"],
    table: Int32[Array, "B W"],
    layer: Int32[Array, ""],
) -> Float[Array, "N P G S K"]:
    """Writes tokens into their rows' pages of one layer.

    Args:
      x: Keys or values [B, T, G, K].
      index: Place of each token in its row [B, T]; W · page size or more for padding, which is
        not written.
      pool: [N, P, G, page size, K].
      table: Pages of each row [B, W].
      layer: Which of the N layers.
    """
    layers, pages, groups, size, dim = pool.shape
    page = jnp.take_along_axis(table, index // size, axis=1, mode="fill", fill_value=pages)
    group = jnp.arange(groups, dtype=jnp.int32)[None, None]
    place = ((layer * pages + page[..., None]) * groups + group) * size + (index % size)[..., None]
    place = jnp.where(page[..., None] < pages, place, layers * pages * groups * size)
    # One line a place: of a scatter over several axes XLA makes one over the first ones, on GPUs by
    # turning the whole pool around and back.
    lines = pool.reshape(-1, dim).at[place].set(x.astype(pool.dtype), mode="drop")
    return lines.reshape(pool.shape)
