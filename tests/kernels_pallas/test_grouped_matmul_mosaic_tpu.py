"""The TPU kernels of the grouped products, interpreted: memory that nobody wrote reads as NaN."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch
from kernels_pallas.grouped_matmul import mosaic_tpu
from tests.kernels_pallas import test_grouped_matmul as suites

# Several blocks along every axis of the small arrays.
SMALL = mosaic_tpu.Blocks(rows=64, columns=256, terms=128)


@pytest.fixture(autouse=True)
def interpreter():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield
    pltpu.reset_tpu_interpret_mode_state()


class TestMosaicTpu(suites.Suite):
    implementation = "mosaic_tpu"
    dims: ClassVar = {"inner": 200, "columns": 130}

    @classmethod
    def multiply(cls, lhs, rhs, sizes, row_align):
        return mosaic_tpu.grouped_matmul_mosaic_tpu(lhs, rhs, sizes, SMALL)

    @classmethod
    def swiglu(cls, lhs, w1, w3, sizes, row_align):
        return mosaic_tpu.grouped_swiglu_mosaic_tpu(lhs, w1, w3, sizes, SMALL)

    # The kernels take no promise; compiling for the interpreter takes seconds a shape.
    test_row_align = test_one_row = None


class TestMosaicTpuBfloat16(TestMosaicTpu):
    """Both kernels in one program; the rest differs by nothing but the dtype."""

    dtype = "bfloat16"
    test_sizes = test_rows_past_the_last_group_are_not_read = None

    @pytest.mark.parametrize("case", ["unaligned"])
    def test_swiglu(self, case):
        super().test_swiglu(case)


class TestListedMosaicTpu(suites.ListedSuite):
    implementation = "mosaic_tpu"

    @pytest.fixture(autouse=True)
    def on_tpu(self, monkeypatch):
        monkeypatch.setattr(dispatch, "target", lambda *_: dispatch.Target("tpu", "TPU v5", 1))

    @pytest.mark.parametrize("rows", [5])
    def test_listed(self, rows):
        super().test_listed(rows)


def test_every_tile_and_group_is_visited():
    sizes = jnp.array([0, 70, 0, 1, 0], jnp.int32)
    of_tiles, count = mosaic_tpu.visits(sizes, 200, 64, every_group=False)
    got = np.array(of_tiles)[:, :count].T.tolist()
    # Group, tile, low, high; the rows past the last group are group 5.
    assert got == [
        [1, 0, 0, 64], [1, 1, 0, 6], [3, 1, 6, 7], [5, 1, 7, 64], [5, 2, 0, 64], [5, 3, 0, 8]
    ]  # fmt: skip
    of_groups, count = mosaic_tpu.visits(sizes, 200, 64, every_group=True)
    groups, _, low, high = np.array(of_groups)[:, :count]
    assert groups.tolist() == [0, 1, 1, 2, 3, 4]
    assert (high - low).clip(0).tolist() == [0, 64, 6, 0, 1, 0]


def test_why_not():
    lhs, rhs = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((8, 128), (2, 128, 128)))
    assert mosaic_tpu.why_not(lhs, rhs) is None
    half = jax.ShapeDtypeStruct(lhs.shape, jnp.float16)
    assert "bfloat16, float16" in mosaic_tpu.why_not(half, rhs)
    empty = jax.ShapeDtypeStruct((0, 128), jnp.bfloat16)
    assert "no empty arrays" in mosaic_tpu.why_not(empty, rhs)
