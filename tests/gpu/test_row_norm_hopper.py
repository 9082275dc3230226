"""Norms of few rows on a Hopper GPU: `make gpu-test`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import add_norm_route, dispatch, row_norm

pytestmark = pytest.mark.skipif(
    dispatch.target().why_not_hopper() is not None, reason="needs a Hopper GPU"
)
STATIC = {"scales": (3.5565588, 0.5), "eps": 1e-5}


def inputs(rows, width, experts, dtype):
    keys = jax.random.split(jax.random.key(rows + width), 4)
    x, out = (3 * jax.random.normal(key, (rows, width), dtype) for key in keys[:2])
    scale = 1 + jax.random.normal(keys[2], (width,), dtype) / 4
    router = jax.random.normal(keys[3], (width, experts), jnp.float32) / width**0.5
    return x, out, scale, router, jnp.arange(rows) % 3 != 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("rows", "width", "experts", "top_k"),
    [(1, 3072, 8, 2), (256, 3072, 8, 2), (17, 1024, 32, 8), (5, 384, 16, 1)],
)
def test_as_in_float32(rows, width, experts, top_k, dtype):
    x, out, scale, router, real = inputs(rows, width, experts, dtype)
    got = jax.jit(
        lambda *args: add_norm_route(
            *args, **STATIC, top_k=top_k, row_align=8, implementation="mosaic_gpu"
        )
    )(x, out, scale, router, real)
    x32, out32, scale32 = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, out, scale))
    total = STATIC["scales"][0] * x32 + STATIC["scales"][1] * out32
    normed = total / np.sqrt((total**2).mean(1, keepdims=True) + STATIC["eps"]) * scale32
    # α, both products, the sum, the norm and its scaling round to bf16, by 2^-9 each at most.
    bound = 6 * 2**-9 if dtype == jnp.bfloat16 else 1e-5
    assert not got.normed[rows:].any()
    got = got._replace(normed=got.normed[:rows])
    for a, b in ((got.total, total), (got.normed, normed)):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= bound * np.linalg.norm(b)
    logits = np.asarray(got.normed, np.float64) @ np.asarray(router, np.float64)
    np.testing.assert_allclose(got.logits, logits, atol=1e-4)
    top, expert = jax.lax.top_k(jax.nn.softmax(got.logits), top_k)
    np.testing.assert_array_equal(got.expert, jnp.where(real[:, None], expert, experts))
    share = np.asarray(top / top.sum(-1, keepdims=True))
    np.testing.assert_allclose(np.asarray(got.share, np.float32), share, rtol=2**-8)


@pytest.mark.parametrize("rows", [1, 16])
def test_adds_parts(rows):
    x, _, scale, router, real = inputs(rows, 3072, 8, jnp.bfloat16)
    parts = jax.random.normal(jax.random.key(7), (8, rows, 3072), jnp.float32)
    got, want = (
        add_norm_route(
            x, parts, scale, router, real, **STATIC, top_k=2, implementation=implementation
        ).total.astype(jnp.float32)
        for implementation in ("mosaic_gpu", "reference")
    )
    # Twice a rounding of the largest of the terms; their sum in float32 may differ in order.
    assert (jnp.abs(got - want) <= 2**-7 * jnp.abs(want).max()).all()
    assert jnp.linalg.norm(got - want) <= 2**-9 * jnp.linalg.norm(want)


@pytest.mark.parametrize("rows", [1, 256])
def test_norms_as_the_reference(rows):
    x, _, scale, *_ = inputs(rows, 3072, 8, jnp.bfloat16)
    got = row_norm(x, scale, 1e-5, implementation="mosaic_gpu")
    want = row_norm(x, scale, 1e-5, implementation="reference")
    error = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32))
    assert (error <= 2**-7 * jnp.abs(want.astype(jnp.float32))).all()


def test_the_first_of_equal_experts_comes_first():
    x, out, scale, router, _ = inputs(2, 3072, 8, jnp.bfloat16)
    router = jnp.tile(router[:, :1], (1, 8))
    got = add_norm_route(
        x, out, scale, router, jnp.ones(2, bool), **STATIC, top_k=2, implementation="mosaic_gpu"
    )
    np.testing.assert_array_equal(got.expert, [[0, 1], [0, 1]])
    np.testing.assert_array_equal(np.asarray(got.share, np.float32), 0.5)
