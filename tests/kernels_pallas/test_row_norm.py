"""Norms of few rows: the kernels, interpreted, are the reference; they lower for Hopper."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas import add_norm_route, row_norm
from kernels_pallas.dispatch import UnavailableError
from kernels_pallas.row_norm import mosaic_gpu
from kernels_pallas.row_norm.reference import add_norm_route_reference, row_norm_reference

SCALES, EPS = (3.5565588, 0.5), 1e-5
# Rows, width, experts, top k; the interpreter compiles for seconds.
CASES = [
    (1, 384, 8, 2, jnp.bfloat16),
    (5, 384, 32, 8, jnp.float32),
    (40, 128, 6, 1, jnp.float32),
]


def inputs(rows, width, experts, dtype):
    keys = jax.random.split(jax.random.key(rows + width), 4)
    x, out = (3 * jax.random.normal(key, (rows, width), dtype) for key in keys[:2])
    scale = 1 + jax.random.normal(keys[2], (width,), dtype) / 4
    router = jax.random.normal(keys[3], (width, experts), jnp.float32) / width**0.5
    return x, out, scale, router, jnp.arange(rows, dtype=jnp.int32) % 3 != 1


def assert_near(got, want, dtype, size=None):
    """Apart by roundings of numbers as large as size, by default as the wanted ones."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    # Twice a rounding to bf16; in float32 sums in another order.
    bound = float(jnp.finfo(dtype).eps) if dtype == jnp.bfloat16 else 1e-5
    assert (jnp.abs(got - want) <= bound * jnp.abs(want if size is None else size)).all()


@pytest.mark.parametrize("case", CASES)
def test_routes_as_the_reference(case):
    """Each result from the one before it, for a rounding moves all that follow."""
    *shape, top_k, dtype = case
    x, out, scale, router, real = inputs(*shape, dtype)
    got = mosaic_gpu.add_norm_route_mosaic_gpu(
        x,
        out,
        scale,
        router,
        real,
        scales=SCALES,
        eps=EPS,
        top_k=top_k,
        row_align=8,
        interpret=plgpu.InterpretGPUParams(),
    )
    want = routed(x, out, scale, router, real, top_k)
    size = SCALES[0] * jnp.abs(x).astype(jnp.float32) + SCALES[1] * jnp.abs(out).astype(jnp.float32)
    assert_near(got.total, want.total, dtype, size)
    # The sum as it is, normed by the reference.
    want = routed(got.total / 2, got.total / 2, scale, router, real, top_k, (1.0, 1.0))
    assert_near(got.normed, want.normed, dtype)
    assert got.normed.shape[0] % 8 == 0
    logits = jnp.dot(got.normed[: shape[0]].astype(jnp.float32), router, precision="highest")
    np.testing.assert_allclose(got.logits, logits, atol=1e-4)
    top, expert = jax.lax.top_k(jax.nn.softmax(got.logits), top_k)
    assert got.normed.dtype == got.share.dtype == dtype
    assert_near(got.share, top / top.sum(-1, keepdims=True), dtype)
    np.testing.assert_array_equal(got.expert, jnp.where(real[:, None], expert, shape[2]))


@partial(jax.jit, static_argnums=(5, 6))
def routed(x, out, scale, router, real, top_k, scales=SCALES):
    return add_norm_route_reference(
        x, out, scale, router, real, scales=scales, eps=EPS, top_k=top_k, row_align=8
    )


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_the_first_of_equal_experts_comes_first(top_k):
    x, out, scale, router, real = inputs(2, 128, 8, jnp.float32)
    router = jnp.tile(router[:, :2], (1, 4))  # 0 = 2 = 4 = 6, 1 = 3 = 5 = 7
    static = {"scales": SCALES, "eps": EPS, "top_k": top_k, "row_align": 1}
    got = mosaic_gpu.add_norm_route_mosaic_gpu(
        x, out, scale, router, real, **static, interpret=plgpu.InterpretGPUParams()
    )
    first = int(got.logits[0, 1] > got.logits[0, 0])
    order = [first, first + 2, first + 4, first + 6, *(1 - first + i for i in (0, 2, 4, 6))]
    assert got.expert[0].tolist() == order[:top_k]
    assert got.expert[1].tolist() == [8] * top_k  # an idle row


def test_norms_as_the_reference():
    dtype = jnp.bfloat16
    x, _, scale, *_ = inputs(7, 640, 8, dtype)
    x = x.at[3].set(0)
    got = mosaic_gpu.row_norm_mosaic_gpu(x, scale, EPS, interpret=plgpu.InterpretGPUParams())
    want = jax.jit(row_norm_reference, static_argnums=2)(x, scale, EPS)
    assert got.dtype == dtype
    assert not got[3].any()
    assert_near(got, want, dtype)
    assert not np.isnan(
        mosaic_gpu.row_norm_mosaic_gpu(x, scale, 0.0, interpret=plgpu.InterpretGPUParams())
    ).any()


def test_adds_parts_as_the_reference():
    x, _, scale, router, real = inputs(2, 128, 6, jnp.bfloat16)
    parts = jax.random.normal(jax.random.key(7), (3, 2, 128), jnp.float32)
    static = {"scales": SCALES, "eps": EPS, "top_k": 1, "row_align": 1}
    got = mosaic_gpu.add_norm_route_mosaic_gpu(
        x, parts, scale, router, real, **static, interpret=plgpu.InterpretGPUParams()
    )
    want = add_norm_route_reference(x, parts, scale, router, real, **static)
    whole = SCALES[0] * jnp.abs(x).astype(jnp.float32) + jnp.abs(parts).sum(0)
    assert_near(got.total, want.total, jnp.bfloat16, whole)


def test_gates_as_the_reference():
    x, gates, scale, *_ = inputs(3, 256, 8, jnp.bfloat16)
    both = jnp.concatenate([x, x, gates], axis=1)  # of which the last are the gates
    got = mosaic_gpu.gated_row_norm_mosaic_gpu(
        x, both, scale, EPS, interpret=plgpu.InterpretGPUParams()
    )
    want = jax.nn.sigmoid(gates) * row_norm_reference(x, scale, EPS)
    assert_near(got, want, jnp.bfloat16, 2 * want.astype(jnp.float32))


@pytest.mark.parametrize("rows", [1, 256])
def test_lowers_for_hopper(rows):
    x, out, scale, router, real = inputs(rows, 3072, 8, jnp.bfloat16)

    def run(x, out, scale, router, real):
        routed = mosaic_gpu.add_norm_route_mosaic_gpu(
            x, out, scale, router, real, scales=SCALES, eps=EPS, top_k=2, row_align=8
        )
        return mosaic_gpu.row_norm_mosaic_gpu(routed.normed, scale, EPS), routed

    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(run).trace(*(jax.typeof(a) for a in (x, out, scale, router, real)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2


def test_says_what_it_cannot_take():
    x, out, scale, router, real = inputs(2, 128, 8, jnp.float32)
    with pytest.raises(UnavailableError, match="needs a Hopper GPU"):
        row_norm(x, scale, EPS, implementation="mosaic_gpu")
    static = {"scales": SCALES, "eps": EPS, "top_k": 2}
    with pytest.raises(UnavailableError, match="available: reference"):
        add_norm_route(x, out, scale, router, real, **static, implementation="mosaic_gpu")
    for shape, experts, why in (
        ((2, 100), 8, "multiple of 128"),
        ((2, 128), 65, "at most 64 experts"),
        ((2, 6144), 32, "values; got 196608"),
        ((257, 128), 8, "at most 256 rows"),
    ):
        rows, router = jnp.zeros(shape), jnp.zeros((shape[1], experts))
        assert why in mosaic_gpu.why_not_route(rows, router)
