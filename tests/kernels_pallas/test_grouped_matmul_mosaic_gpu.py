"""The Hopper kernels of the grouped products as far as a machine without one goes.

tests/gpu runs them. GPU interpret mode does not end in useful time on two cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch, grouped_matmul, grouped_swiglu, listed_ffn, tune, tuning
from kernels_pallas.grouped_matmul import api, mosaic_gpu
from kernels_pallas.grouped_matmul.chunked import grouped_matmul_chunked
from kernels_pallas.grouped_matmul.shapes import Shape

HOPPER = dispatch.Target("gpu", "NVIDIA H200", 132)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "target", lambda *arrays: HOPPER)


@pytest.mark.parametrize("rows", [1021, 100])
@pytest.mark.parametrize("op", [grouped_matmul, grouped_swiglu])
def test_lowers_for_cuda(on_hopper, op, rows):
    matrices = 1 if op is grouped_matmul else 2
    lhs, sizes = jax.ShapeDtypeStruct((rows, 128), jnp.bfloat16), jnp.full(4, rows // 4, jnp.int32)
    rhs = [jax.ShapeDtypeStruct((4, 128, 192), jnp.bfloat16)] * matrices

    def both(lhs, *rhs):
        out, pull = jax.vjp(lambda *x: op(*x, sizes), lhs, *rhs)
        return out, pull(out)

    text = jax.jit(both).trace(lhs, *rhs).lower(lowering_platforms=("cuda",)).as_text()
    # The product, the gradient in lhs, and one in each matrix.
    assert text.count("mosaic_gpu") >= 2 + matrices


def test_listed_lowers_for_cuda(on_hopper):
    x, groups = jax.ShapeDtypeStruct((3, 128), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
    into, back = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((4, 128, 192), (4, 192, 128)))
    traced = jax.jit(listed_ffn).trace(x, into, into, back, groups)
    assert (
        traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 2
    )


def test_layers_share_a_lowering(on_hopper):
    """Lowering a kernel takes a second of Python."""
    lhs, sizes = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16), jnp.full(4, 64, jnp.int32)
    rhs = jax.ShapeDtypeStruct((4, 128, 128), jnp.bfloat16)

    def layers(lhs, rhs):
        for _ in range(3):
            lhs = grouped_matmul(lhs, rhs, sizes)
        return lhs.astype(jnp.float32).sum()

    def kernels(run):
        text = jax.jit(run).trace(lhs, rhs).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("custom_call @mosaic_gpu")

    assert kernels(layers) == 1
    assert kernels(jax.grad(layers, argnums=(0, 1))) == 3


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 128, 128), "float32", "it takes bfloat16; got bfloat16, float32"),
        ((2, 128, 100), "bfloat16", "K and N in multiples of 64; got K = 128, N = 100"),
    ],
)
def test_why_not(shape, dtype, reason):
    lhs = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16)
    assert reason in mosaic_gpu.why_not(lhs, jax.ShapeDtypeStruct(shape, dtype))


def test_tiles_of_rows():
    sizes = jnp.array([5, 0, 130, 1], jnp.int32)
    *table, ends = mosaic_gpu.row_tiles(sizes, 144, 64)
    count = int(ends[-1])
    # Group, first row, low, high; the rows past the last group are group 4.
    assert np.array(table)[:, :count].T.tolist() == [
        [0, 0, 0, 5], [2, 0, 5, 64], [2, 64, 0, 64], [2, 128, 0, 7], [3, 128, 7, 8], [4, 136, 0, 8]
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_tiles_cover_every_row_once(seed):
    rng = np.random.default_rng(seed)
    rows, block = 8 * int(rng.integers(20, 60)), 64
    sizes = rng.multinomial(rng.integers(0, rows), np.full(9, 1 / 9)) * rng.integers(0, 2, 9)
    *table, ends = mosaic_gpu.row_tiles(jnp.asarray(sizes, jnp.int32), rows, block)
    owner = np.full(rows, -1)
    for group, first, low, high in np.array(table)[:, : int(ends[-1])].T:
        assert first % 8 == 0
        assert (owner[first + low : first + high] == -1).all()
        owner[first + low : first + high] = group
    expected = np.repeat(np.arange(10), [*sizes, rows - sizes.sum()])
    np.testing.assert_array_equal(owner, expected)


def test_few_rows_a_group_take_small_tiles():
    def blocks(what, rows, columns=9216):
        return mosaic_gpu.default_blocks(what, rows, 32, columns, cores=132)

    many, few = (blocks("forward", rows) for rows in (65536, 512))
    assert (many.rows, few.rows) == (128, 64)
    assert blocks("d_rhs", 512) == many
    # Two experts have 72 tiles of 256 columns, for 132 multiprocessors.
    assert (few.columns, blocks("forward", 2).columns) == (256, 64)


def test_tuned_blocks_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.load.cache_clear()
    lhs, rhs = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((100, 64), (2, 64, 128)))
    key = api.shape_key("d_lhs", lhs, rhs)
    assert key == "M 128, K 64, N 128, E 2, pass d_lhs"
    blocks = mosaic_gpu.Blocks(panel=3)
    tuning.store(HOPPER.kind, "grouped_matmul", "mosaic_gpu", key, blocks._asdict())
    tuning.load.cache_clear()
    passes = api.gpu_passes("forward", lhs, rhs, HOPPER)
    assert passes.d_lhs == blocks
    assert passes.forward == mosaic_gpu.default_blocks("forward", 100, 2, 128, 132)
    tuning.load.cache_clear()


@pytest.mark.parametrize("what", ["forward", "swiglu", "d_lhs", "d_rhs"])
@pytest.mark.parametrize("rows", [512, 65536])
def test_candidates_fit_in_shared_memory(what, rows):
    for blocks in tune.grouped_candidates(what, rows, 32):
        operands = blocks.stages * (blocks.rows + blocks.columns) * 64 * 2
        assert operands + blocks.rows * 2 * 64 * 2 <= 226 * 2**10


@pytest.mark.parametrize("right", [True, False])
def test_tuning_refuses_wrong_results(monkeypatch, capsys, right):
    def product(lhs, rhs, sizes, passes):
        return grouped_matmul_chunked(lhs, rhs, sizes, 1) * jnp.bfloat16(1 if right else 1.05)

    monkeypatch.setattr(mosaic_gpu, "grouped_matmul_mosaic_gpu", product)
    best = tune.tune_grouped_pass("forward", Shape(16, 64, 64, 8), HOPPER)
    candidates = tune.grouped_candidates("forward", 16, 8)
    assert best in candidates if right else best is None
    assert capsys.readouterr().out.count("refused") == (0 if right else len(candidates))
