"""Attention over pages against the dense form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import paged_attention, write_pages
from kernels_pallas.paged_attention import chunked, mosaic_gpu, step_mosaic_gpu
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


@pytest.mark.parametrize(
    ("kernel", "why_not", "queries", "page"),
    [
        (mosaic_gpu.paged_attention_mosaic_gpu, mosaic_gpu.why_not, 256, 64),
        (step_mosaic_gpu.paged_attention_step_mosaic_gpu, step_mosaic_gpu.why_not, 1, 64),
        (step_mosaic_gpu.paged_attention_step_mosaic_gpu, step_mosaic_gpu.why_not, 1, 16),
    ],
)
def test_hopper_kernels_lower_for_cuda(kernel, why_not, queries, page):
    """tests/gpu runs them."""
    q = jax.ShapeDtypeStruct((2, queries, 8, 128), jnp.bfloat16)
    pool = jax.ShapeDtypeStruct((2, 20, 2, page, 128), jnp.bfloat16)
    where = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 8), (2, queries), ()))
    assert why_not(q, pool) is None
    lowered = jax.jit(kernel).trace(q, pool, pool, *where).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


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


@pytest.mark.parametrize(
    ("heads", "page", "dim", "dtype", "reason"),
    [
        (8, 64, 128, "float32", "it takes bfloat16; got float32"),
        (8, 64, 96, "bfloat16", "heads of 64 or 128; got 96"),
        (8, 96, 128, "bfloat16", "pages of 8, 16, 32 or a multiple of 64 tokens; got 96"),
        (256, 64, 128, "bfloat16", "64 queries a KV head; got 128"),
    ],
)
def test_why_not_a_step(heads, page, dim, dtype, reason):
    q = jax.ShapeDtypeStruct((1, 1, heads, dim), dtype)
    keys = jax.ShapeDtypeStruct((2, 20, 2, page, dim), dtype)
    assert reason in step_mosaic_gpu.why_not(q, keys)


def test_parts_of_a_row():
    """At least 512 tokens, and as many of them as the row needs."""
    blocks = jnp.array([0, 1, 8, 9, 64, 65])
    np.testing.assert_array_equal(step_mosaic_gpu.blocks_of_a_part(blocks, 8), [8, 8, 8, 8, 8, 16])


def test_parts_are_put_together(monkeypatch):
    """The kernel's place is taken by a loop over its parts; what it leaves unwritten is NaN."""
    starts = []

    def partial(q, keys, values, table, seen, span, layer, parts):
        batch, groups, rows, dim = q.shape
        out = np.full((batch, parts, groups, rows, dim), np.nan, np.float32)
        log_sum = np.full(out.shape[:-1], np.nan, np.float32)
        for row, part in np.ndindex(batch, parts):
            first, size = (64 * int(span[row]) * n for n in (part, 1))
            if first >= seen[row]:
                continue
            starts.append(first)
            k, v = (
                np.asarray(x)[int(layer), np.asarray(table)[row]].swapaxes(0, 1)
                for x in (keys, values)
            )
            k, v = (
                x.reshape(groups, -1, dim)[:, first : min(first + size, int(seen[row]))]
                for x in (k, v)
            )
            scores = np.einsum("grk,gtk->grt", q[row], k) * dim**-0.5
            log_sum[row, part] = np.log(np.exp(scores).sum(-1))
            weights = np.exp(scores - log_sum[row, part][..., None])
            out[row, part] = np.einsum("grt,gtk->grk", weights, v)
        return jnp.asarray(out), jnp.asarray(log_sum)

    monkeypatch.setattr(step_mosaic_gpu, "_partial", partial)
    rng = np.random.default_rng(0)
    size, width = 64, 24
    keys, values = (draw(rng, 2, 60, GROUPS, size, DIM) for _ in range(2))
    table = jnp.asarray(rng.permutation(60)[: 2 * width].reshape(2, width), jnp.int32)
    table = jnp.concatenate([table, table[:1]])
    q = draw(rng, 3, 1, HEADS, DIM)
    # One that ends with a part, one that ends in the second, one that is idle.
    index = jnp.asarray([[1535], [700], [size * width]], jnp.int32)
    where = table, index, jnp.int32(1)
    got = step_mosaic_gpu.paged_attention_step_mosaic_gpu(q, keys, values, *where)
    assert starts == [0, 512, 1024, 0, 512]
    np.testing.assert_allclose(
        got, chunked.paged_attention_chunked(q, keys, values, *where), atol=1e-5
    )
