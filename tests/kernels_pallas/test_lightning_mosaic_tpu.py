"""The TPU kernels of lightning attention, interpreted: memory that nobody wrote reads as NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.lightning_attention.mosaic_tpu import (
    Blocks,
    default_blocks,
    lightning_attention_mosaic_tpu,
    why_not,
)
from kernels_pallas.lightning_attention.step_mosaic_tpu import lightning_attention_step_mosaic_tpu
from kernels_pallas.testing import lightning_inputs, lightning_oracle
from tests.kernels_pallas.test_lightning_attention import DECAY, SEGMENTS

SMALL = Blocks(64, 3, 64, 1)
# Relative error in norm.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-3}


@pytest.fixture(autouse=True)
def interpreter():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield
    pltpu.reset_tpu_interpret_mode_state()


@functools.partial(jax.jit, static_argnums=8)
def _run(q, k, v, decay, segment_ids, initial_state, d_out, d_state, blocks):
    """Results and gradients in one program."""

    def attend(q, k, v, state):
        return lightning_attention_mosaic_tpu(q, k, v, decay, segment_ids, state, blocks)

    results, pull = jax.vjp(attend, q, k, v, initial_state)
    return *results, *pull((d_out, d_state))


def _error(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def _check(inputs, dtype="float32", blocks=SMALL):
    actual, expected = _run(*inputs, blocks), lightning_oracle(inputs)
    for name, got, want in zip(expected._fields, actual, expected, strict=True):
        assert got.shape == want.shape, name
        if want.any():
            assert _error(got, want) <= TOLERANCE[dtype], name
        else:
            assert not got.any(), name
    q, k, v = (x.dtype for x in inputs[:3])
    assert [x.dtype for x in actual] == [v, jnp.float32, q, k, v, jnp.float32]


# The compiler takes seconds for each shape, and the cases with segments share one.
@pytest.mark.parametrize("length", [1, 64, 65, 1000])
def test_lengths(length):
    inputs = lightning_inputs(length, batch=1, length=length, decay=DECAY)
    _check(inputs, blocks=Blocks(64, 1, 64, 1))


@pytest.mark.parametrize("case", SEGMENTS)
def test_segments(case):
    _check(lightning_inputs(7, length=200, decay=DECAY, segment_ids=SEGMENTS[case]))


def test_no_decay():
    ids = SEGMENTS["everything"]
    _check(lightning_inputs(5, length=200, decay=(0.0, 0.0, 0.0), segment_ids=ids))


def test_rows_without_tokens_keep_their_state():
    ids = np.zeros((2, 200), np.int32)
    inputs = lightning_inputs(8, length=200, decay=DECAY, segment_ids=ids)
    out, state, *_ = _run(*inputs, SMALL)
    np.testing.assert_array_equal(state, inputs.initial_state)
    assert not np.any(out)


def test_padding_may_hold_anything():
    inputs = lightning_inputs(9, length=200, decay=DECAY, segment_ids=SEGMENTS["everything"])
    padding = (inputs.segment_ids == 0)[..., None, None]
    poison = {n: np.where(padding, np.nan, getattr(inputs, n)) for n in ("q", "k", "v", "d_out")}
    poisoned = inputs._replace(**{n: x.astype(np.float32) for n, x in poison.items()})
    for same, result in zip(_run(*poisoned, SMALL), _run(*inputs, SMALL), strict=True):
        np.testing.assert_array_equal(same, result)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_default_blocks_at_full_width(dtype):
    ids = np.concatenate([np.full((1, n), i, np.int32) for n, i in ((300, 1), (1, 2), (499, 3))], 1)
    inputs = lightning_inputs(
        3, batch=1, length=800, decay=DECAY[:2], key_dim=128, value_dim=128, dtype=dtype
    )
    _check(inputs._replace(segment_ids=ids), dtype, None)


def test_widths_of_more_than_one_tile():
    inputs = lightning_inputs(4, batch=1, length=65, decay=DECAY[:1], key_dim=8, value_dim=136)
    _check(inputs, blocks=None)


def test_many_chunks_of_bfloat16():
    inputs = lightning_inputs(
        5, batch=1, length=1024, decay=DECAY, key_dim=128, value_dim=128, dtype="bfloat16"
    )
    _check(inputs, "bfloat16", Blocks(256, 3, 128, 3))


def test_no_races():
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    inputs = lightning_inputs(6, length=130, decay=DECAY[:1])
    with pltpu.force_tpu_interpret_mode(params):  # Raises at a race.
        _check(inputs, blocks=Blocks(128, 1, 64, 1))


def test_a_row_does_not_depend_on_its_batch():
    inputs = lightning_inputs(2, length=200, decay=DECAY, segment_ids=SEGMENTS["documents"])
    alone = (x if x.ndim == 1 else x[1:] for x in inputs)
    for one, both in zip(_run(*alone, SMALL), _run(*inputs, SMALL), strict=True):
        np.testing.assert_array_equal(one[0], both[1])


def test_default_blocks():
    def blocks(batch, length, heads, dtype, dim=128):
        x = jax.ShapeDtypeStruct((batch, length, heads, dim), dtype)
        assert why_not(x, x) is None
        return default_blocks(x, x)

    assert blocks(1, 2**20, 64, jnp.bfloat16) == Blocks(256, 4, 256, 4)
    assert blocks(1, 1, 1, jnp.float32).chunk == 128
    assert blocks(1, 4096, 8, jnp.bfloat16).heads == 4  # Two cores share 8 heads.
    assert blocks(1, 4096, 7, jnp.float32, 256).heads == 1


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (Blocks(96, 3, 64, 3), "chunk = 96 is not a multiple of 64"),
        (Blocks(64, 3, 64, 2), "backward_heads = 2 does not divide the 3 heads"),
    ],
)
def test_blocks_that_do_not_fit(blocks, message):
    inputs = lightning_inputs(1, batch=1, length=1, decay=DECAY)
    with pytest.raises(ValueError, match=f"mosaic_tpu cannot run: {message}"):
        _run(*inputs, blocks)


def test_other_dtypes():
    x = jax.ShapeDtypeStruct((1, 1, 1, 128), jnp.float16)
    assert why_not(x, x) == "it takes bfloat16 and float32, not float16"


_step = jax.jit(lightning_attention_step_mosaic_tpu)


def _step_inputs(dtype, batch, heads=3, key_dim=24, value_dim=16, entries=6):
    rng = np.random.default_rng(0)
    keys, values = (batch, heads, key_dim), (batch, heads, value_dim)
    q, k, v = (rng.standard_normal(s).astype(jnp.dtype(dtype)) for s in (keys, keys, values))
    pool = rng.standard_normal((entries, heads, key_dim, value_dim)).astype(np.float32)
    return q, k, v, np.linspace(0, 0.9, heads, dtype=np.float32), pool


def _step_oracle(q, k, v, decay, pool, slots):
    q, k, v, pool = (x.astype(np.float64) for x in (q, k, v, pool))
    out = np.zeros(v.shape)
    for b, slot in enumerate(slots):
        if slot >= 0:
            pool[slot] *= np.exp(-decay.astype(np.float64))[:, None, None]
            pool[slot] += k[b, :, :, None] * v[b, :, None, :]
            out[b] = np.einsum("hk,hkv->hv", q[b], pool[slot])
    return out, pool


@pytest.mark.parametrize(
    "slots", [(4, 0, 5, 2), (-1, -1, 3, 5), (1, -1, 0, -1), (-1, -1, -1, -1)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step(slots, dtype):
    args = _step_inputs(dtype, len(slots))
    out, pool = _step(*args, np.array(slots, np.int32))
    want_out, want_pool = _step_oracle(*args, slots)
    assert out.dtype == args[2].dtype
    for row, slot in enumerate(slots):
        if slot < 0:
            assert not np.any(out[row])
        else:
            assert _error(out[row], want_out[row]) <= TOLERANCE[dtype]
    assert _error(pool, want_pool) <= TOLERANCE["float32"]
    others = sorted({*range(len(pool))} - {*slots})
    np.testing.assert_array_equal(pool[np.array(others)], args[-1][others])


def test_step_in_blocks_of_heads():
    args = _step_inputs("bfloat16", 3, heads=18, key_dim=128, value_dim=128, entries=4)
    slots = np.array([3, -1, 1], np.int32)
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    with pltpu.force_tpu_interpret_mode(params):
        out, pool = jax.jit(lightning_attention_step_mosaic_tpu)(*args, slots)
    want_out, want_pool = _step_oracle(*args, slots)
    assert _error(out, want_out) <= TOLERANCE["bfloat16"]
    assert _error(pool, want_pool) <= TOLERANCE["float32"]
