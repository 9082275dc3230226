"""Attention over pages on a Hopper GPU: `make gpu-test`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch, paged_attention
from kernels_pallas.paged_attention import chunked, mosaic_gpu, step_mosaic_gpu

pytestmark = pytest.mark.skipif(
    dispatch.target().why_not_hopper() is not None, reason="needs a Hopper GPU"
)


def inputs(queries, heads, groups, dim, size, starts, padding=0):
    """Rows that have `starts` tokens before their queries, on pages that lie anywhere."""
    batch = len(starts)
    width = max(-(-(start + queries) // size) for start in starts) + 1
    pages = batch * width + 3
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, queries, heads, dim), jnp.bfloat16)
    pool = (2, pages, groups, size, dim)
    pools = (jax.random.normal(key, pool, jnp.bfloat16) for key in keys[1:])
    table = np.random.default_rng(0).permutation(pages)[: batch * width].reshape(batch, width)
    index = np.array(starts)[:, None] + np.arange(queries)[None]
    index[:, queries - padding :] = width * size
    return q, *pools, *(jnp.asarray(x, jnp.int32) for x in (table, index, 1))


@pytest.mark.parametrize(
    "case",
    [
        (256, 8, 2, 128, 64, [0]),
        (1024, 8, 2, 128, 64, [3000]),
        (384, 4, 4, 128, 64, [0, 777], 100),
        (256, 8, 2, 64, 64, [130]),
        (256, 4, 1, 128, 16, [17, 500], 3),
        (512, 4, 2, 128, 128, [64]),
    ],
)
def test_as_in_float32(case):
    q, keys, values, *where = inputs(*case)
    got = jax.jit(mosaic_gpu.paged_attention_mosaic_gpu)(q, keys, values, *where)
    exact = (x.astype(jnp.float32) for x in (q, keys, values))
    want = jax.jit(chunked.paged_attention_chunked)(*exact, *where)
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    # The weights are rounded to bf16 and so is the result, by 2^-9 each at most.
    assert error <= 2**-8


@pytest.mark.parametrize(
    "case",
    [
        (8, 2, 128, 64, [99, 4999, 0]),
        (8, 2, 128, 64, [0, 63, 64, 39999]),
        (8, 2, 128, 16, [699, 1299]),
        (64, 8, 128, 128, [699, 1299]),
        (8, 4, 64, 64, [63, 2999]),
        (16, 1, 128, 64, [8999, 0, 1, 512, 511]),
        (64, 8, 128, 64, [1999] * 59 + [8999]),
    ],
)
@pytest.mark.parametrize("idle", [False, True])
def test_a_step_as_in_float32(case, idle):
    q, keys, values, table, index, layer = inputs(1, *case)
    if idle:
        index = index.at[0].set(table.shape[1] * keys.shape[3])
    where = table, index, layer
    got = jax.jit(step_mosaic_gpu.paged_attention_step_mosaic_gpu)(q, keys, values, *where)
    exact = (x.astype(jnp.float32) for x in (q, keys, values))
    want = jax.jit(chunked.paged_attention_chunked)(*exact, *where)
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    # As above, and once more where parts are put together.
    assert error <= 2**-8
    if idle:
        np.testing.assert_array_equal(got[0], 0)


def test_places_without_tokens_may_hold_any_number():
    q, keys, values, table, index, layer = inputs(256, 4, 2, 128, 64, [20])
    # The last block of 128 keys has one page with tokens and one without.
    last = table[0, int(index.max()) // 64 + 1 :]
    assert last.size
    others = (x.at[:, last].set(1e4) for x in (keys, values))
    run = jax.jit(paged_attention)
    got = run(q, *others, table, index, layer)
    np.testing.assert_array_equal(got, run(q, keys, values, table, index, layer))


def test_best_on_this_gpu():
    args = inputs(256, 4, 2, 128, 64, [0])
    assert "mosaic_gpu" in jax.jit(paged_attention).lower(*args).as_text()
    step = inputs(1, 4, 2, 128, 64, [0])
    assert "mosaic_gpu" in jax.jit(paged_attention).lower(*step).as_text()
    few = inputs(16, 4, 2, 128, 64, [0])
    assert "mosaic_gpu" not in jax.jit(paged_attention).lower(*few).as_text()
