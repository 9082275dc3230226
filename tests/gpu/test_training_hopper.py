"""On a GPU: attention by cuDNN against its XLA form, and experts whose shares come first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch
from mmjax.layers import experts
from mmjax.layers.fused_softmax import self_attention, why_not
from mmjax.layers.softmax import softmax_attention

pytestmark = pytest.mark.skipif(
    dispatch.target().why_not_hopper() is not None, reason="needs a Hopper GPU"
)

LENGTH = 1024
# Tokens of the documents of two rows; what is left is padding, and a last row starts with it.
DOCUMENTS = {
    "whole": [[1024], [1024]],
    "padded": [[1000], [17]],
    "packed": [[300, 724], [1, 500, 400]],
    "padding in front": [[-24, 1000], [1024]],
}


def segments(documents):
    ids = np.zeros((len(documents), LENGTH), np.int32)
    for row, sizes in enumerate(documents):
        place = 0
        for number, size in enumerate(sizes, 1):
            ids[row, place : place + abs(size)] = number if size > 0 else 0
            place += abs(size)
    return jnp.asarray(ids)


def gradients(attend, q, k, v, d_out):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_fused_attention(name):
    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(rng.standard_normal((2, LENGTH, heads, 128)), jnp.bfloat16)
        for heads in (8, 2, 2, 8)
    )
    assert why_not(q) is None
    ids = segments(DOCUMENTS[name])
    place = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    index = jnp.where(ids != 0, place, -1)

    def exact(q, k, v):
        return softmax_attention(q, k, v, index, query_segments=ids, key_segments=ids)

    fused = jax.jit(lambda *x: gradients(lambda *y: self_attention(*y, index, ids), *x))
    got = fused(q, k, v, d_out)
    want = jax.jit(lambda *x: gradients(exact, *x))(
        *(x.astype(jnp.float32) for x in (q, k, v, d_out))
    )
    for actual, expected in zip(got, want, strict=True):
        error = jnp.abs(actual.astype(jnp.float32) - expected)
        assert float(error.max()) <= 2e-2 * float(jnp.abs(expected).max())


def test_shares_before_the_last_product():
    rng = np.random.default_rng(0)

    def some(*shape):
        return jnp.asarray(rng.standard_normal(shape) / shape[-2] ** 0.5, jnp.bfloat16)

    kernels = experts.Weights(some(8, 256, 512), some(8, 256, 512), some(8, 512, 256))
    tokens = jnp.asarray(rng.standard_normal((1000, 256)), jnp.bfloat16)
    share = jnp.asarray(rng.random((1000, 2)), jnp.bfloat16)
    expert = jnp.asarray(rng.integers(0, 8, (1000, 2)), jnp.int32)
    d_out = jnp.asarray(rng.standard_normal((1000, 256)), jnp.bfloat16)

    def run(apply, dtype):
        cast = jax.tree.map(lambda x: x.astype(dtype), (tokens, share, kernels))
        out, pull = jax.vjp(lambda t, s, w: apply(t, s, expert, w), *cast)
        return out, *jax.tree.leaves(pull(d_out.astype(dtype)))

    got = jax.jit(lambda: run(experts.apply_experts, jnp.bfloat16))()
    want = jax.jit(lambda: run(experts._every_expert, jnp.float32))()
    for actual, expected in zip(got, want, strict=True):
        error = jnp.abs(actual.astype(jnp.float32) - expected)
        assert float(error.max()) <= 3e-2 * float(jnp.abs(expected).max())
