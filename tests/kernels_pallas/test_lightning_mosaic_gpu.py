"""The Hopper kernels as far as a machine without one goes; tests/gpu runs them.

GPU interpret mode has no product whose left operand is in registers, which these kernels use.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    dispatch,
    gated_lightning_step,
    lightning_attention,
    lightning_attention_step,
    tuning,
)
from kernels_pallas.hopper import LOG2E
from kernels_pallas.lightning_attention import mosaic_gpu
from kernels_pallas.lightning_attention.clock import read_clock
from kernels_pallas.testing import lightning_inputs, lightning_oracle

HOPPER = dispatch.Target("gpu", "NVIDIA H200", 132)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "target", lambda *arrays: HOPPER)


def _lower(f, *args):
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("mosaic_gpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_cuda(on_hopper, dtype):
    # 2 heads and 4096 tokens: cut into stretches, so both kernels are there, in both directions.
    array = jax.ShapeDtypeStruct((1, 4100, 2, 128), dtype)
    segments = jax.ShapeDtypeStruct((1, 4100), jnp.int32)

    def both(q, k, v, segment_ids):
        decay = jnp.ones((2,), jnp.float32)
        out, pull = jax.vjp(
            lambda q, k, v: lightning_attention(q, k, v, decay, segment_ids=segment_ids)[0], q, k, v
        )
        return out, pull(out)

    assert _lower(both, array, array, array, segments) >= 8


def test_step_lowers_for_cuda_in_place(on_hopper):
    row = jax.ShapeDtypeStruct((3, 2, 128), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((5, 2, 128, 128), jnp.float32)
    slots = jax.ShapeDtypeStruct((3,), jnp.int32)
    decay = jax.ShapeDtypeStruct((2,), jnp.float32)

    def step(q, k, v, decay, state, slots):
        return lightning_attention_step(q, k, v, decay, state, slots=slots)

    lowered = jax.jit(step, donate_argnums=4).trace(row, row, row, decay, state, slots)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert "output_operand_alias" in text


def test_gated_step_lowers_for_cuda_in_place(on_hopper):
    """Two kernels, and nothing but them and views."""
    shapes = ((3, 4 * 256), jnp.bfloat16), ((2,), jnp.float32), ((256,), jnp.bfloat16)
    shapes += ((4, 5, 2, 128, 128), jnp.float32), ((3,), jnp.int32), ((), jnp.int32)
    step = functools.partial(gated_lightning_step, eps=1e-6)
    traced = jax.jit(step, donate_argnums=3).trace(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2
    assert "output_operand_alias" in text


def test_heads_too_wide():
    array = jax.ShapeDtypeStruct((1, 8, 2, 256), jnp.bfloat16)
    assert "K, V <= 128; got K = 256" in mosaic_gpu.why_not(array, array)
    half = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.float16)
    assert "float16" in mosaic_gpu.why_not(half, half)


@pytest.mark.parametrize(
    ("shape", "stretches"),
    [((1, 65536, 64, 128), 1), ((1, 65536, 8, 128), 8), ((1, 64, 8, 128), 1)],
)
def test_default_blocks_fill_the_gpu(shape, stretches):
    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert mosaic_gpu.default_blocks(array, array, 132).stretches == stretches


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_each_stretch_starts_from_the_state_before_it(packed, reverse):
    """The combination of what the pieces add, against the states that one sweep passes through."""
    length, chunk = 700, 64
    ids = None
    if packed:
        # No segment starts at a border, where a part of the sequence alone could not tell.
        ids = np.array([[1, 2, 0, 2, 3], [1, 1, 0, 1, 4]], np.int32)
        ids = np.repeat(ids, [50, 50, 200, 166, 234], axis=1)
    inputs = lightning_inputs(
        0, length=length, decay=(0.05, 0.0), key_dim=8, value_dim=8, segment_ids=ids
    )

    def plan(stretch):
        count = -(-11 // stretch)
        blocks = mosaic_gpu.Blocks(chunk=chunk)
        return mosaic_gpu._Plan(blocks, 1, length, 11, stretch, count, packed, reverse)

    def sweep(first, last, state):
        """The state on the other side of the tokens from first to last."""
        tokens = {name: getattr(inputs, name)[:, first:last] for name in ("q", "k", "v", "d_out")}
        segments = None if ids is None else ids[:, first:last]
        zeros = np.zeros_like(state)
        initial, final = (zeros, state) if reverse else (state, zeros)
        part = inputs._replace(**tokens, segment_ids=segments, initial_state=initial, d_state=final)
        results = lightning_oracle(part)
        return results.d_initial_state if reverse else results.state

    whole, pieces = plan(4), plan(2)
    state = inputs.initial_state
    clock = None
    if ids is not None:
        clock = read_clock(jnp.pad(jnp.asarray(ids), ((0, 0), (0, 11 * chunk - length))))
    borders = np.minimum(np.arange(pieces.stretches + 1) * 2 * chunk, length)
    parts = list(itertools.pairwise(borders))
    added = [
        sweep(first, last, np.zeros_like(state))
        for first, last in (parts[1:] if reverse else parts[:-1])
    ]
    rate = jnp.asarray(inputs.decay) * LOG2E
    added = jnp.asarray(np.stack(added), jnp.float32)
    got = mosaic_gpu._starts(whole, pieces, added, jnp.asarray(state), rate, clock)
    for i in range(whole.stretches):
        first, last = i * 4 * chunk, min((i + 1) * 4 * chunk, length)
        if reverse:
            want = sweep(last, length, state) if last < length else state
        else:
            want = sweep(0, first, state) if first else state
        np.testing.assert_allclose(got[:, i], want, rtol=0, atol=2e-4)


def test_tuned_blocks_are_stored_and_found(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.load.cache_clear()
    key = tuning.shape_key(T=64, H=2)
    assert key == "T 64, H 2"
    assert tuning.tuned("NVIDIA X1", "op", "mosaic_gpu", key) is None
    file = tuning.store("NVIDIA X1", "op", "mosaic_gpu", key, {"chunk": 64})
    tuning.load.cache_clear()
    assert file.name == "nvidia_x1.json"
    assert tuning.tuned("NVIDIA X1", "op", "mosaic_gpu", key) == {"chunk": 64}
    tuning.load.cache_clear()
