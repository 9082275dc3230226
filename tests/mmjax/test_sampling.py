"""A decode step's logits, and the draw: filters, temperature, what log-probabilities are of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import SamplingParams, sampling
from mmjax.engine.programs import _last_logits
from tests.mmjax.programs import random_model, small_config


def choose(logits, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0, wanted=sampling.Wanted.ANYTHING):
    """(tokens, log-probabilities of all) for rows that draw alike, each with a key of its own."""
    rows = logits.shape[0]

    def full(value, dtype=jnp.float32):
        return jnp.full(rows, value, dtype)

    how = sampling.Draw(full(temperature), full(top_p), full(min_p), full(top_k, jnp.int32))
    keys = jax.random.split(jax.random.key(1), rows)
    return jax.device_get(sampling.draw(logits, keys, full(0, jnp.int32), how, wanted))


LOGITS = jnp.asarray(np.random.default_rng(0).standard_normal((64, 48)) * 3, jnp.float32)


def draw(**params):
    tokens, logp = choose(LOGITS, **params)
    return tokens, np.take_along_axis(logp, tokens[:, None], 1)[:, 0]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"top_p": 1e-45},
        {"temperature": 1e-4},
        {"temperature": 1e-10},
        {"temperature": 1e-45},
    ],
)
def test_settings_that_leave_only_the_likeliest(params):
    tokens, _ = draw(**params)
    np.testing.assert_array_equal(tokens, LOGITS.argmax(-1))


@pytest.mark.parametrize(
    ("wanted", "temperature"),
    [("LIKELIEST", 0.0), ("CHANCE", 0.0), ("CHANCE", 1.0), ("CHANCE", 0.7)],
)
def test_a_program_for_less_draws_the_same(wanted, temperature):
    got = choose(LOGITS, temperature, wanted=sampling.Wanted[wanted])
    jax.tree.map(np.testing.assert_array_equal, got, choose(LOGITS, temperature))


@pytest.mark.parametrize(
    ("requests", "wanted"),
    [
        ([], "LIKELIEST"),
        ([{"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.5, "logprobs": 0}], "LIKELIEST"),
        ([{"temperature": 0.0}, {}], "CHANCE"),
        ([{}, {"top_k": 2}, {}], "ANYTHING"),
        ([{"temperature": 0.0, "logprobs": 3}, {}], "ANYTHING"),
    ],
)
def test_what_requests_ask_for(requests, wanted):
    params = [SamplingParams(**request) for request in requests]
    assert sampling.Wanted.by(params) is sampling.Wanted[wanted]


@pytest.mark.parametrize("temperature", [1e-35, 1e-10, 1e-6, 1e-3])
def test_no_temperature_makes_a_log_probability_above_zero(temperature):
    """Fused differently, a large logit and the largest one have differed."""
    tokens, logp = choose(LOGITS * 100, temperature, top_p=0.9)
    assert (logp <= 0).all()
    assert (np.take_along_axis(logp, tokens[:, None], 1) == 0).all()


def test_plain_sampling_is_not_greedy():
    assert (draw()[0] != LOGITS.argmax(-1)).any()


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.5}, {}])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_of_the_distribution_before_filters(params, temperature):
    tokens, logprobs = draw(temperature=temperature, **params)
    exact = np.asarray(LOGITS, np.float64) / np.float32(temperature)
    expected = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    # The sum of the weights is rounded to 2^-24 of itself.
    np.testing.assert_allclose(logprobs, expected[np.arange(64), tokens], rtol=1e-6, atol=2e-7)


def test_greedy_logprobs_are_at_temperature_one():
    tokens, logprobs = draw(temperature=0.0)
    expected = jax.nn.log_softmax(LOGITS)[np.arange(64), tokens]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6)


def test_top_k_keeps_k():
    tokens, _ = draw(top_k=3, temperature=10.0)
    rank = (LOGITS[np.arange(64), tokens][:, None] < LOGITS).sum(-1)
    assert set(rank.tolist()) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probability = jnp.array([0.4, 0.3, 0.2, 0.1])
    logits = jnp.tile(jnp.log(probability)[None], (200, 1))
    for top_p, kept in ((0.35, {0}), (0.45, {0, 1}), (0.75, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        tokens, _ = choose(logits, top_p=top_p)
        assert set(tokens.tolist()) == kept


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 3.5},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"n": 2.0},
        {"logprobs": 1.0},
        {"thinking_budget": 1.5},
        {"stop_ids": (1 << 31,)},
        {"stop_ids": (None,)},
        {"stop_ids": ("a",)},
        {"stop_ids": (-1,)},
        {"stop_ids": 5},
    ],
)
def test_sampling_parameters_out_of_range(wrong):
    params = SamplingParams()
    for name, value in wrong.items():  # The tests' own check of types would come first.
        object.__setattr__(params, name, value)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must .*got"):
        params.__post_init__()


def test_bfloat16_head_is_the_float32_head():
    model = random_model(small_config(dtype="bfloat16", param_dtype="bfloat16"))
    drawn = np.random.default_rng(0).standard_normal((5, 1, model.cfg.hidden_size))
    hidden = jnp.asarray(drawn, jnp.bfloat16)
    expected = model.logits(hidden)[:, 0]
    found = _last_logits(model, hidden)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
