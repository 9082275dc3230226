"""The suite of the grouped products on a Hopper GPU: `make gpu-test`."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch, grouped_matmul
from kernels_pallas.grouped_matmul import mosaic_gpu, shapes
from tests.kernels_pallas import test_grouped_matmul as suites

pytestmark = pytest.mark.skipif(
    dispatch.target().why_not_hopper() is not None, reason="needs a Hopper GPU"
)


class TestMosaicGpu(suites.Suite):
    implementation = "mosaic_gpu"
    dtype = "bfloat16"
    # Tiles of the result, and boxes of TMA, that stick out.
    dims: ClassVar = {"inner": 320, "columns": 192}


class TestListedMosaicGpu(suites.ListedSuite):
    implementation = "mosaic_gpu"
    dtype = "bfloat16"
    dims: ClassVar = (320, 192)


class TestMosaicGpuWholeTiles(TestMosaicGpu):
    """The blocks of many rows, which the suite's few would not take by themselves."""

    passes = mosaic_gpu.Passes(*[mosaic_gpu.Blocks()] * 3, cores=132)
    test_row_align = test_one_row = None

    @classmethod
    def multiply(cls, lhs, rhs, sizes, row_align):
        return mosaic_gpu.grouped_matmul_mosaic_gpu(lhs, rhs, sizes, cls.passes)

    @classmethod
    def swiglu(cls, lhs, w1, w3, sizes, row_align):
        return mosaic_gpu.grouped_swiglu_mosaic_gpu(lhs, w1, w3, sizes, None, cls.passes)


@pytest.mark.parametrize("what", ["forward", "d_lhs", "d_rhs"])
def test_real_sizes(what):
    """Unaligned groups at full width, against each group's own dense product."""
    shape = shapes.LAYERS[0]._replace(rows=16384, groups=8)
    sizes = shapes.skewed(shape)
    keys = jax.random.split(jax.random.key(0), 3)
    dims = (shape.rows, shape.inner), (8, shape.inner, shape.columns), (shape.rows, shape.columns)
    arrays = [jax.random.normal(key, x, jnp.bfloat16) for key, x in zip(keys, dims, strict=True)]
    lhs, rhs, d_out = arrays
    group = int(np.argmax(sizes))
    own = slice(int(sizes[:group].sum()), int(sizes[: group + 1].sum()))

    @jax.jit
    def run(lhs, rhs, d_out):
        out, pull = jax.vjp(lambda *x: grouped_matmul(*x, jnp.asarray(sizes)), lhs, rhs)
        d_lhs, d_rhs = pull(d_out)
        return {"forward": out[own], "d_lhs": d_lhs[own], "d_rhs": d_rhs[group]}[what]

    def product(a, b):
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    want = {
        "forward": lambda: product(lhs[own], rhs[group]),
        "d_lhs": lambda: product(d_out[own], rhs[group].T),
        "d_rhs": lambda: product(lhs[own].T, d_out[own]),
    }[what]()
    got = run(lhs, rhs, d_out)
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert error <= suites.RELATIVE_ERROR["bfloat16"]


def test_best_on_this_gpu():
    lhs, rhs = jnp.ones((64, 128), jnp.bfloat16), jnp.ones((2, 128, 128), jnp.bfloat16)
    sizes = jnp.array([3, 5], jnp.int32)
    assert "mosaic_gpu" in jax.jit(grouped_matmul).lower(lhs, rhs, sizes).as_text()
    # Not silently in TF32.
    lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    assert "mosaic_gpu" not in jax.jit(grouped_matmul).lower(lhs, rhs, sizes).as_text()
