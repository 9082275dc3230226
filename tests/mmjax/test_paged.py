"""Attention over pages against the dense form."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine.programs import _last_logits
from mmjax.layers import paged
from mmjax.layers.softmax import softmax_attention
from tests.mmjax.programs import random_model, small_config

HEADS, GROUPS, DIM, SIZE, WIDTH, PAGES, LAYERS = 4, 2, 8, 4, 6, 20, 2


def draw(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("span", [4, 12, 24])
@pytest.mark.parametrize("queries", [1, 5, 11])
def test_pages_hold_what_a_row_holds(monkeypatch, span, queries):
    """Rows of several lengths, one of them all padding, whose pages lie anywhere in the pool."""
    monkeypatch.setattr(paged, "CPU_SPAN", span)
    monkeypatch.setattr(paged, "CPU_QUERY_BLOCK", 4)
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
        paged.write_pages(x, places, pool, table, layer)
        for x, pool in zip((k, v), before, strict=True)
    )
    np.testing.assert_array_equal(keys[0], before[0][0])
    q, index = draw(rng, 4, queries, HEADS, DIM), jnp.asarray(index, jnp.int32)
    out = paged.paged_attention(q, keys, values, table, index, layer)
    blind = jnp.where(index < SIZE * WIDTH, index, -1)
    np.testing.assert_allclose(out, softmax_attention(q, k, v, blind), atol=1e-6)
    np.testing.assert_array_equal(out[3], 0)


def test_bfloat16_head_is_the_float32_head():
    model = random_model(small_config(dtype="bfloat16", param_dtype="bfloat16"))
    hidden = draw(np.random.default_rng(0), 5, 1, model.cfg.hidden_size).astype(jnp.bfloat16)
    expected = model.logits(hidden)[:, 0]
    found = _last_logits(model, hidden)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
