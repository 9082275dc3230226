"""Attention over pages against the dense form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import paged_attention, write_pages
from kernels_pallas.paged_attention import chunked, mosaic_gpu
from mmjax.layers.softmax import softmax_attention

HEADS, GROUPS, DIM, SIZE, WIDTH, PAGES, LAYERS = 4, 2, 8, 4, 6, 20, 2


def draw(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("span", [4, 12, 24])
@pytest.mark.parametrize("queries", [1, 5, 11])
def test_pages_hold_what_a_row_holds(monkeypatch, span, queries):
    """Rows of several lengths, one of them all padding, whose pages lie anywhere in the pool."""
    monkeypatch.setattr(chunked, "CPU_SPAN", span)
    monkeypatch.setattr(chunked, "CPU_QUERY_BLOCK", 4)
    rng = np.random.default_rng(span + queries)
    ends = np.array([queries, 13, 24, 0])
    index = np.maximum(ends[:, None] - queries, 0) + np.arange(queries)[None]
    index = np.where(ends[:, None] > 0, index, SIZE * WIDTH)
    table = rng.permutation(PAGES)[:18].reshape(3, WIDTH)
    table = jnp.asarray(np.concatenate([table, table[:1]]), jnp.int32)
    k, v = (draw(rng, 4, SIZE * WIDTH, GROUPS, DIM) for _ in range(2))
    places = jnp.broadcast_to(jnp.arange(SIZE * WIDTH, dtype=jnp.int32)[None], (4, SIZE * WIDTH))
    # The row of padding writes nothing.
    places = jnp.where(jnp.asarray(ends)[:, None] > 0, places, SIZE * WIDTH)
    layer = jnp.int32(1)
    before = [draw(rng, LAYERS, PAGES, GROUPS, SIZE, DIM) for _ in range(2)]
    keys, values = (
        write_pages(x, places, pool, table, layer) for x, pool in zip((k, v), before, strict=True)
    )
    np.testing.assert_array_equal(keys[0], before[0][0])
    q, index = draw(rng, 4, queries, HEADS, DIM), jnp.asarray(index, jnp.int32)
    out = paged_attention(q, keys, values, table, index, layer)
    blind = jnp.where(index < SIZE * WIDTH, index, -1)
    np.testing.assert_allclose(out, softmax_attention(q, k, v, blind), atol=1e-6)
    np.testing.assert_array_equal(out[3], 0)


def test_hopper_kernel_lowers_for_cuda():
    """tests/gpu runs it."""
    q = jax.ShapeDtypeStruct((2, 256, 8, 128), jnp.bfloat16)
    pool = jax.ShapeDtypeStruct((2, 20, 2, 64, 128), jnp.bfloat16)
    where = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 8), (2, 256), ()))
    assert mosaic_gpu.why_not(q, pool) is None
    run = jax.jit(mosaic_gpu.paged_attention_mosaic_gpu)
    text = run.trace(q, pool, pool, *where).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("queries", "page", "dim", "dtype", "reason"),
    [
        (256, 64, 128, "float32", "it takes bfloat16; got float32"),
        (256, 64, 96, "bfloat16", "heads of 64 or 128; got 96"),
        (256, 48, 128, "bfloat16", "pages of 8 to 128 tokens, a power of two; got 48"),
        (100, 64, 128, "bfloat16", "queries in multiples of 128; got 100"),
    ],
)
def test_why_not(queries, page, dim, dtype, reason):
    q = jax.ShapeDtypeStruct((1, queries, 8, dim), dtype)
    assert reason in mosaic_gpu.why_not(q, jax.ShapeDtypeStruct((2, 20, 2, page, dim), dtype))
