"""The suite of lightning attention on a Hopper GPU: `make gpu-test`."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch, lightning_attention
from kernels_pallas.lightning_attention import mosaic_gpu
from kernels_pallas.testing import lightning_inputs, lightning_oracle
from tests.kernels_pallas import test_lightning_attention as suites

pytestmark = pytest.mark.skipif(
    dispatch.target().why_not_hopper() is not None, reason="needs a Hopper GPU"
)


class TestMosaicGpu(suites.Suite):
    implementation = "mosaic_gpu"


class TestStepMosaicGpu(suites.StepSuite):
    implementation = "mosaic_gpu"
    dims: ClassVar = {"key_dim": 128, "value_dim": 128}


class TestGatedStepMosaicGpu(suites.GatedStepSuite):
    implementation = "mosaic_gpu"
    heads, dim = 8, 128


class TestGatedStepOfNarrowHeadsMosaicGpu(TestGatedStepMosaicGpu):
    heads, dim = 4, 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("packed", [False, True])
def test_stretches(packed, dtype):
    """The sequence split, at sizes whose stretches and pieces end unevenly."""
    length = 1500
    ids = None
    if packed:
        ids = np.sort(np.random.default_rng(1).integers(1, 9, (2, length)), 1).astype(np.int32)
        ids[:, 700:760] = 0
        ids[0, 900:905] = np.arange(100, 105)
    inputs = lightning_inputs(
        1, length=length, decay=suites.DECAY, key_dim=128, value_dim=128, segment_ids=ids,
        dtype=dtype,
    )  # fmt: skip
    stages = 4 if dtype == "bfloat16" else 1
    blocks = mosaic_gpu.Blocks(stages=stages, stretches=3)

    @jax.jit
    def run(q, k, v, decay, segment_ids, state, d_out, d_state):
        def attend(q, k, v, state):
            return mosaic_gpu.lightning_attention_mosaic_gpu(
                q, k, v, decay, segment_ids, state, blocks
            )

        results, pull = jax.vjp(attend, q, k, v, state)
        return *results, *pull((d_out, d_state))

    actual = run(*inputs)
    for name, got, want in zip(
        suites.lightning_oracle(inputs)._fields, actual, lightning_oracle(inputs), strict=True
    ):
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert error <= suites.RELATIVE_ERROR[dtype], name


def test_best_on_this_gpu():
    x = jnp.ones((1, 8, 1, 128), jnp.bfloat16)
    decay = jnp.ones((1,), jnp.float32)
    text = jax.jit(lambda x: lightning_attention(x, x, x, decay)).lower(x).as_text()
    assert "mosaic_gpu" in text
