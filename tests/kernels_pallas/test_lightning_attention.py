"""One suite for every implementation of lightning attention, against the float64 recurrence."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    gated_lightning_step,
    lightning_attention,
    lightning_attention_step,
)
from kernels_pallas.dispatch import UnavailableError
from kernels_pallas.testing import assert_close, lightning_inputs, lightning_oracle

# The largest and the smallest rate of the released model (80 layers, 64 heads), and one between.
DECAY = (0.9170132, 0.01, 3.90625e-8)
LENGTHS = (1, 63, 64, 65, 255, 256, 500, 1000, 2048)
# Largest ‖actual - float64‖ / ‖float64‖.
RELATIVE_ERROR = {"bfloat16": 5e-3, "float32": 2e-5}


def _packed(*rows):
    """Segment ids from (id, count) pairs, one list a row."""
    return np.array([[i for i, count in row for _ in range(count)] for row in rows], np.int32)


SEGMENTS = {
    "documents": _packed([(1, 64), (2, 1), (3, 135)], [(7, 100), (3, 63), (9, 37)]),
    "of length 1": np.tile(np.arange(1, 201, dtype=np.int32), (2, 1)),
    "padding at the end": _packed([(1, 130), (0, 70)], [(1, 1), (0, 199)]),
    "padding at the start": _packed([(0, 70), (1, 130)], [(0, 199), (1, 1)]),
    "padding in the middle": _packed([(1, 60), (0, 70), (1, 70)], [(1, 3), (0, 61), (2, 136)]),
    "padding alone": _packed([(0, 200)], [(1, 200)]),
    "everything": _packed(
        [(0, 5), (4, 60), (0, 64), (4, 1), (2, 70)], [(1, 1), (0, 1), (2, 1), (3, 127), (0, 70)]
    ),
}


def _attend(inputs, **kwargs):
    return lightning_attention(*map(jnp.asarray, inputs[:4]), **kwargs)


@functools.cache
def _program(implementation):
    """Results and gradients in one program."""

    @jax.jit
    def run(q, k, v, decay, segment_ids, initial_state, d_out, d_state):
        def attend(q, k, v, state):
            return lightning_attention(
                q,
                k,
                v,
                decay,
                segment_ids=segment_ids,
                initial_state=state,
                implementation=implementation,
            )

        (out, state), pull = jax.vjp(attend, q, k, v, initial_state)
        return out, state, *pull((d_out, d_state))

    return run


class Suite:
    """What every implementation has to do."""

    implementation: str

    def check(self, inputs, dtype="float32"):
        actual = _program(self.implementation)(*inputs)
        expected = lightning_oracle(inputs)
        # An output sums K products of states that sum T products each.
        terms = inputs.q.shape[1] * max(inputs.q.shape[-1], inputs.v.shape[-1])
        for name, got, want in zip(expected._fields, actual, expected, strict=True):
            assert_close(got, want, dtype, terms, name)
            error = np.linalg.norm(np.asarray(got, np.float64) - want)
            assert error <= RELATIVE_ERROR[dtype] * np.linalg.norm(want), name
        assert [x.dtype for x in actual] == [
            *(inputs.v.dtype, jnp.float32, inputs.q.dtype, inputs.k.dtype, inputs.v.dtype),
            jnp.float32,
        ]

    @pytest.mark.parametrize("length", LENGTHS)
    def test_lengths(self, length):
        self.check(lightning_inputs(length, length=length, decay=DECAY))

    @pytest.mark.parametrize("case", SEGMENTS)
    def test_segments(self, case):
        self.check(lightning_inputs(7, length=200, decay=DECAY, segment_ids=SEGMENTS[case]))

    def test_bfloat16(self):
        inputs = lightning_inputs(3, length=200, decay=DECAY, dtype="bfloat16")
        self.check(inputs._replace(segment_ids=SEGMENTS["everything"]), "bfloat16")

    def test_values_wider_than_keys(self):
        self.check(lightning_inputs(4, length=65, decay=DECAY, key_dim=8, value_dim=40))

    def test_one_head(self):
        self.check(lightning_inputs(10, length=130, decay=DECAY[:1]))

    def test_same_bits_again(self):
        inputs = lightning_inputs(11, length=130, decay=DECAY, dtype="bfloat16")
        run = _program(self.implementation)
        for first, again in zip(run(*inputs), run(*inputs), strict=True):
            np.testing.assert_array_equal(first, again)

    def test_a_row_does_not_depend_on_its_batch(self):
        inputs = lightning_inputs(11, length=130, decay=DECAY, dtype="bfloat16")
        rows = {n: x for n, x in inputs._asdict().items() if n not in ("decay", "segment_ids")}
        run = _program(self.implementation)
        alone = run(*inputs._replace(**{name: x[:1] for name, x in rows.items()}))
        for together, one in zip(run(*inputs), alone, strict=True):
            np.testing.assert_array_equal(together[:1], one)

    def test_no_decay(self):
        self.check(lightning_inputs(5, length=65, decay=(0.0, 0.0, 0.0)))

    def test_without_initial_state(self):
        inputs = lightning_inputs(6, length=65, decay=DECAY)
        inputs = inputs._replace(initial_state=np.zeros_like(inputs.initial_state))
        out, state = _attend(inputs, implementation=self.implementation)
        expected = lightning_oracle(inputs)
        assert_close(out, expected.out, "float32", 65 * 24)
        assert_close(state, expected.state, "float32", 65 * 24)

    def test_a_row_without_tokens_keeps_its_state(self):
        inputs = lightning_inputs(8, length=65, decay=DECAY)
        inputs = inputs._replace(segment_ids=np.zeros((2, 65), np.int32))
        out, state, *_ = _program(self.implementation)(*inputs)
        np.testing.assert_array_equal(state, inputs.initial_state)
        np.testing.assert_array_equal(out, np.zeros_like(out))

    def test_padding_is_not_read(self):
        inputs = lightning_inputs(9, length=200, decay=DECAY, segment_ids=SEGMENTS["everything"])
        poison = np.where(inputs.segment_ids == 0, np.float32(1e30), np.float32(1))
        poisoned = inputs._replace(v=inputs.v * poison[..., None, None])
        run = _program(self.implementation)
        (out, state, *_), (same_out, same_state, *_) = run(*inputs), run(*poisoned)
        np.testing.assert_array_equal(same_out, out)
        np.testing.assert_array_equal(same_state, state)


class TestReference(Suite):
    implementation = "reference"
    # XLA cuts its one large product differently for another batch.
    test_a_row_does_not_depend_on_its_batch = None


class TestChunked(Suite):
    implementation = "chunked"


class StepSuite:
    """What every implementation of one step has to do."""

    implementation: str
    dims: ClassVar = {"key_dim": 24, "value_dim": 16}

    def run(self, inputs, slots=None, pool=None):
        first = (jnp.asarray(x[:, 0]) for x in (inputs.q, inputs.k, inputs.v))
        state = inputs.initial_state if pool is None else pool
        return jax.jit(
            functools.partial(lightning_attention_step, implementation=self.implementation)
        )(*first, jnp.asarray(inputs.decay), jnp.asarray(state), slots=slots)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_one_token(self, dtype):
        inputs = lightning_inputs(1, length=1, decay=DECAY, dtype=dtype, **self.dims)
        out, state = self.run(inputs)
        expected = lightning_oracle(inputs)
        assert out.dtype == dtype
        assert_close(out, expected.out[:, 0], dtype, self.dims["key_dim"])
        assert_close(state, expected.state, "float32", 1)

    def test_slots(self):
        inputs = lightning_inputs(2, batch=4, length=1, decay=DECAY, **self.dims)
        slots = np.array([5, -1, 0, 2], np.int32)
        pool = np.random.default_rng(0).standard_normal((7, *inputs.initial_state.shape[1:]))
        pool = pool.astype(np.float32)
        active = slots >= 0
        pool[slots[active]] = inputs.initial_state[active]
        out, after = self.run(inputs, jnp.asarray(slots), pool)
        expected = lightning_oracle(inputs)
        assert_close(out, np.where(active[:, None, None], expected.out[:, 0], 0), "float32", 24)
        assert_close(after[slots[active]], expected.state[active], "float32", 1)
        untouched = sorted(set(range(7)) - set(slots))
        np.testing.assert_array_equal(after[np.array(untouched)], pool[untouched])

    def test_all_idle(self):
        inputs = lightning_inputs(3, length=1, decay=DECAY, **self.dims)
        out, after = self.run(inputs, jnp.array([-1, -1], jnp.int32))
        np.testing.assert_array_equal(out, np.zeros_like(out))
        np.testing.assert_array_equal(after, inputs.initial_state)


class TestStepXla(StepSuite):
    implementation = "chunked"


class GatedStepSuite:
    """What every implementation of a step with its norm and gate has to do."""

    implementation: str
    heads, dim = 3, 16

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_as_in_float64(self, dtype):
        heads, dim, layers, slots = self.heads, self.dim, 3, np.array([3, -1, 0], np.int32)
        rng = np.random.default_rng(4)
        projected = jnp.asarray(rng.standard_normal((3, 4 * heads * dim)), dtype)
        scale = jnp.asarray(1 + rng.standard_normal(heads * dim) / 4, dtype)
        decay = np.linspace(0.01, 0.5, heads, dtype=np.float32)
        pool = rng.standard_normal((layers, 5, heads, dim, dim)).astype(np.float32)
        step = functools.partial(gated_lightning_step, eps=1e-6, implementation=self.implementation)
        out, after = jax.jit(step)(
            projected, jnp.asarray(decay), scale, jnp.asarray(pool), jnp.asarray(slots),
            jnp.int32(1),
        )  # fmt: skip

        x = np.asarray(projected, np.float64)
        qkv, gate = x[:, : 3 * heads * dim].reshape(3, heads, 3, dim), x[:, 3 * heads * dim :]
        qkv = qkv / (1 + np.exp(-qkv))
        q, k, v = (qkv[:, :, i] for i in range(3))
        state = np.exp(-np.float64(decay))[:, None, None] * pool[1, slots]
        state += k[..., :, None] * v[..., None, :]
        mixed = (q[..., :, None] * state).sum(-2).reshape(3, -1)
        mixed /= np.sqrt((mixed**2).mean(1, keepdims=True) + 1e-6)
        want = mixed * np.asarray(scale, np.float64) / (1 + np.exp(-gate))
        want[slots < 0] = 0
        assert out.dtype == dtype
        # silu, the step's output, the norm, its scaling, the gate and the product round to bf16.
        bound = 1e-5 if dtype == "float32" else 6 * 2**-9
        error = np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want)
        assert error <= bound
        assert not np.asarray(out[1], np.float64).any()
        active = slots >= 0
        np.testing.assert_allclose(
            after[1][slots[active]], state[active], atol=1e-5 if dtype == "float32" else 0.1
        )
        untouched = np.ones((layers, 5), bool)
        untouched[1, slots[active]] = False
        np.testing.assert_array_equal(np.asarray(after)[untouched], pool[untouched])


class TestGatedStepXla(GatedStepSuite):
    implementation = "chunked"


def test_gated_step_with_projections_of_another_width():
    with pytest.raises(ValueError, match=r"projected has shape \(1, 12\), expected \(1, 16\)"):
        gated_lightning_step(
            jnp.ones((1, 12)), jnp.ones(1), jnp.ones(4), jnp.ones((1, 1, 1, 4, 4)),
            jnp.zeros(1, jnp.int32), jnp.int32(0), eps=1e-6,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("implementation", "reason"),
    [
        ("mosaic_gpu", "'mosaic_gpu' cannot run: it needs a Hopper GPU; the arrays are on cpu"),
        ("mosaic_tpu", "'mosaic_tpu' cannot run: it needs a TPU; the arrays are on cpu"),
        ("Chunked", "does not know the implementation 'Chunked'"),
    ],
)
def test_implementation_that_cannot_run(implementation, reason):
    inputs = lightning_inputs(1, length=1, decay=DECAY)
    with pytest.raises(UnavailableError, match=rf"{reason}.*; available: chunked, reference"):
        _attend(inputs, implementation=implementation)


def test_no_tokens():
    inputs = lightning_inputs(1, length=0, decay=DECAY)
    with pytest.raises(ValueError, match="at least one token; got T = 0"):
        _attend(inputs)


def test_step_with_a_state_of_another_shape():
    inputs = lightning_inputs(1, length=1, decay=DECAY)
    with pytest.raises(
        ValueError, match=r"state has shape \(1, 3, 24, 16\), expected \(2, 3, 24, 16\)"
    ):
        lightning_attention_step(
            *(jnp.asarray(x[:, 0]) for x in (inputs.q, inputs.k, inputs.v)),
            jnp.asarray(inputs.decay),
            jnp.asarray(inputs.initial_state[:1]),
        )
