"""One suite for every implementation of the grouped product, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul
from kernels_pallas.dispatch import UnavailableError
from kernels_pallas.grouped_matmul import chunked
from kernels_pallas.testing import assert_close, grouped_inputs, grouped_oracle

SIZES = {
    "unaligned": (5, 100, 64, 1, 30),
    "empty": (0, 64, 0, 136, 0),
    "all in one": (0, 0, 0, 0, 200),
    "none": (0, 0, 0, 0, 0),
}


def _multiply(inputs, **kwargs):
    return grouped_matmul(*map(jnp.asarray, inputs[:3]), **kwargs)


@functools.cache
def _program(implementation, row_align):
    @jax.jit
    def run(lhs, rhs, group_sizes, d_out):
        def multiply(lhs, rhs):
            return grouped_matmul(
                lhs, rhs, group_sizes, row_align=row_align, implementation=implementation
            )

        out, pull = jax.vjp(multiply, lhs, rhs)
        return out, *pull(d_out)

    return run


class Suite:
    """What every implementation has to do."""

    implementation: str

    def check(self, inputs, dtype="float32", row_align=1):
        actual = _program(self.implementation, row_align)(*inputs)
        expected = grouped_oracle(inputs)
        terms = max(*inputs.lhs.shape, inputs.rhs.shape[2])
        for name, got, want in zip(expected._fields, actual, expected, strict=True):
            assert_close(got, want, dtype, terms, name)
            assert got.dtype == inputs.lhs.dtype

    @pytest.mark.parametrize("case", SIZES)
    def test_sizes(self, case):
        self.check(grouped_inputs(1, SIZES[case], rows=200))

    def test_rows_past_the_last_group(self):
        self.check(grouped_inputs(2, (5, 0, 64, 1, 30), rows=200))

    @pytest.mark.parametrize("sizes", [(64, 0, 128, 64), (0, 0, 64, 64)])
    def test_aligned(self, sizes):
        self.check(grouped_inputs(3, sizes, rows=256), row_align=64)

    def test_bfloat16(self):
        self.check(grouped_inputs(4, SIZES["unaligned"], dtype="bfloat16"), "bfloat16")

    def test_one_row(self):
        self.check(grouped_inputs(5, (0, 1)))


class TestReference(Suite):
    implementation = "reference"


class TestChunked(Suite):
    implementation = "chunked"


class TestChunkedWithoutGathering(Suite):
    """The path of large weights, XLA's own ragged_dot."""

    implementation = "chunked"

    @pytest.fixture(autouse=True)
    def _small_limit(self, monkeypatch):
        monkeypatch.setattr(chunked, "_GATHERED_WEIGHTS", 0)
        _program.cache_clear()
        yield
        _program.cache_clear()


def test_padding_rows_are_not_read():
    inputs = grouped_inputs(6, (30, 34), rows=100)
    lhs = inputs.lhs.copy()
    lhs[64:] = np.nan
    out, poisoned = _multiply(inputs), _multiply(inputs._replace(lhs=lhs))
    np.testing.assert_array_equal(poisoned, out)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu", "ragged"])
def test_implementation_that_cannot_run(implementation):
    inputs = grouped_inputs(1, (4, 4))
    with pytest.raises(UnavailableError, match=r"grouped_matmul.*available: chunked, reference"):
        _multiply(inputs, implementation=implementation)


def test_rows_that_are_not_aligned():
    with pytest.raises(ValueError, match="9 rows are no multiple of row_align 8"):
        _multiply(grouped_inputs(1, (4, 5)), row_align=8)
