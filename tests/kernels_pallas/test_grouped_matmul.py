"""One suite for every implementation of the grouped products, against float64."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul, grouped_swiglu, listed_ffn
from kernels_pallas.dispatch import UnavailableError
from kernels_pallas.grouped_matmul import api, chunked, shapes
from kernels_pallas.testing import (
    assert_close,
    grouped_inputs,
    grouped_oracle,
    swiglu_oracle,
)

SIZES = {
    "unaligned": (5, 100, 64, 1, 30),
    "empty": (0, 64, 0, 136, 0),
    "all in one": (0, 0, 0, 0, 200),
    "none": (0, 0, 0, 0, 0),
    "rows past the last group": (5, 0, 64, 1, 30),
    "aligned": (64, 0, 64, 64, 8),
}
# Relative error in norm.
RELATIVE_ERROR = {"float32": 2e-5, "bfloat16": 5e-3}


def _multiply(inputs, **kwargs):
    return grouped_matmul(*map(jnp.asarray, inputs[:3]), **kwargs)


@functools.cache
def _program(suite, row_align):
    """Result and gradients, the product's and SwiGLU's."""

    @jax.jit
    def product(lhs, rhs, sizes, d_out):
        out, pull = jax.vjp(lambda *x: suite.multiply(*x, sizes, row_align), lhs, rhs)
        return out, *pull(d_out)

    @jax.jit
    def swiglu(lhs, w1, w3, sizes, d_out):
        out, pull = jax.vjp(lambda *x: suite.swiglu(*x, sizes, row_align), lhs, w1, w3)
        return out, *pull(d_out)

    return product, swiglu


class Suite:
    """What every implementation has to do."""

    implementation: str
    dtype: ClassVar = "float32"
    dims: ClassVar = {"inner": 24, "columns": 16}

    @classmethod
    def multiply(cls, lhs, rhs, sizes, row_align):
        how = {"row_align": row_align, "implementation": cls.implementation}
        return grouped_matmul(lhs, rhs, sizes, **how)

    @classmethod
    def swiglu(cls, lhs, w1, w3, sizes, row_align):
        how = {"row_align": row_align, "implementation": cls.implementation}
        return grouped_swiglu(lhs, w1, w3, sizes, **how)

    def inputs(self, seed, sizes, rows=None):
        inputs = grouped_inputs(seed, sizes, rows=rows, dtype=self.dtype, **self.dims)
        scale = self.dims["inner"] ** -0.5
        return inputs._replace(rhs=(inputs.rhs * scale).astype(self.dtype))

    def check(self, inputs, row_align=1):
        program, _ = _program(type(self), row_align)
        results, expected = program(*inputs), grouped_oracle(inputs)
        self.compare(results, expected)
        terms = max(*inputs.lhs.shape, inputs.rhs.shape[2])
        for name, got, want in zip(expected._fields, results, expected, strict=True):
            assert_close(got, want, self.dtype, terms, name)

    def compare(self, actual, expected):
        for name, got, want in zip(expected._fields, actual, expected, strict=True):
            error = np.linalg.norm(np.asarray(got, np.float64) - want)
            assert error <= RELATIVE_ERROR[self.dtype] * np.linalg.norm(want), name
            assert got.dtype == self.dtype

    @pytest.mark.parametrize("case", SIZES)
    def test_sizes(self, case):
        self.check(self.inputs(1, SIZES[case], rows=200))

    @pytest.mark.parametrize("case", SIZES)
    def test_swiglu(self, case):
        inputs = self.inputs(1, SIZES[case], rows=200)
        w3 = self.inputs(2, SIZES[case], rows=200).rhs
        lhs, w1, sizes, d_out = inputs
        _, program = _program(type(self), 1)
        self.compare(program(lhs, w1, w3, sizes, d_out), swiglu_oracle(inputs, w3))

    @pytest.mark.parametrize("sizes", [(64, 0, 128, 64), (0, 0, 64, 64)])
    def test_row_align(self, sizes):
        self.check(self.inputs(3, sizes, rows=256), row_align=64)

    def test_one_row(self):
        self.check(self.inputs(5, (0, 1)))

    def test_rows_past_the_last_group_are_not_read(self):
        inputs = self.inputs(6, SIZES["rows past the last group"], rows=200)
        last = sum(inputs.group_sizes)
        lhs, d_out = inputs.lhs.copy(), inputs.d_out.copy()
        lhs[last:], d_out[last:] = np.nan, np.nan
        program, _ = _program(type(self), 1)
        poisoned = inputs._replace(lhs=lhs, d_out=d_out)
        for got, want in zip(program(*poisoned), program(*inputs), strict=True):
            np.testing.assert_array_equal(got, want)


class ListedSuite:
    """`listed_ffn` against float64: in any order, one twice, and none (4 groups, 4 for none)."""

    implementation: str
    dtype: ClassVar = "float32"
    dims: ClassVar = (24, 16)

    @pytest.mark.parametrize("rows", [1, 5, 17])
    def test_listed(self, rows):
        rng = np.random.default_rng(rows)
        inner, hidden = self.dims

        def draw(*shape):
            values = rng.standard_normal(shape) * shape[-2] ** -0.5
            return jnp.asarray(values, self.dtype)

        x, w2 = draw(rows, inner) * 5, draw(4, hidden, inner)
        w1, w3 = draw(4, inner, hidden), draw(4, inner, hidden)
        groups = jnp.array([2, 0, 4, 2], jnp.int32)
        run = jax.jit(functools.partial(listed_ffn, implementation=self.implementation))
        got = run(x, w1, w3, w2, groups)
        assert got.dtype == self.dtype
        x, w1, w3, w2 = (np.asarray(a, np.float64) for a in (x, w1, w3, w2))
        for turn, group in enumerate([2, 0, None, 2]):
            want = np.zeros_like(x)
            if group is not None:
                h1, h3 = x @ w1[group], x @ w3[group]
                want = (h1 / (1 + np.exp(-h1)) * h3) @ w2[group]
            error = np.linalg.norm(np.asarray(got[turn], np.float64) - want)
            assert error <= 2 * RELATIVE_ERROR[self.dtype] * np.linalg.norm(want)


class TestListedReference(ListedSuite):
    implementation = "reference"


class TestListedChunked(ListedSuite):
    implementation = "chunked"


def test_listed_takes_few_rows():
    matrix = jnp.ones((2, 8, 8))
    groups = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="at most 64 rows, got 65"):
        listed_ffn(jnp.ones((65, 8)), matrix, matrix, matrix, groups)


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


class TestChunkedBfloat16(Suite):
    implementation = "chunked"
    dtype = "bfloat16"
    # The rest differs by nothing but the dtype.
    test_row_align = test_one_row = test_rows_past_the_last_group_are_not_read = None


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu", "ragged"])
@pytest.mark.parametrize("op", [grouped_matmul, grouped_swiglu])
def test_implementation_that_cannot_run(op, implementation):
    lhs, rhs, sizes, _ = map(jnp.asarray, grouped_inputs(1, (4, 4)))
    matrices = [rhs] * (1 if op is grouped_matmul else 2)
    with pytest.raises(UnavailableError, match=r"grouped_.*available: chunked, reference"):
        op(lhs, *matrices, sizes, implementation=implementation)


def test_rows_that_are_not_aligned():
    with pytest.raises(ValueError, match="9 rows are no multiple of row_align 8"):
        _multiply(grouped_inputs(1, (4, 5)), row_align=8)


def test_shapes_that_do_not_fit():
    # Asked directly, since the annotations that tests check at every call would speak first.
    lhs, rhs, sizes, _ = map(jnp.asarray, grouped_inputs(1, (4, 5)))
    matrices = {"w1": rhs, "w3": rhs[:, :, :8]}
    with pytest.raises(ValueError, match=r"w2 \(2, 24, 16\) do not fit"):
        api._check_listed(lhs, rhs, rhs, rhs)
    with pytest.raises(ValueError, match=r"w1 \(2, 24, 16\), w3 \(2, 24, 8\) .* do not fit"):
        api._check("grouped_swiglu", lhs, matrices, sizes, 1)


@pytest.mark.parametrize("routing", [shapes.balanced, shapes.skewed, shapes.by_chance])
def test_routings_place_every_row(routing):
    for shape in shapes.LAYERS:
        sizes = routing(shape)
        assert sizes.shape == (shape.groups,)
        assert sizes.sum() == shape.rows
    assert (shapes.skewed(shape) == 0).sum() == 4
