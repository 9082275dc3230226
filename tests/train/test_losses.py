"""Losses against closed forms, and wrong losses that the same checks refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.mmjax.programs import random_model, small_config
from train import losses
from train.losses import cispo_loss, cross_entropy, group_advantages, token_logprobs

CAP = 2.0


def draw(ratio, *, advantage=None, groups=3, samples=4, width=6, seed=0):
    """Token log-probabilities at one importance ratio, and groups of different token counts."""
    rng = np.random.default_rng(seed)
    shape = (groups, samples, width)
    behaviour = -rng.uniform(0.1, 4, shape)
    logprobs = behaviour + np.log(ratio)
    lengths = rng.integers(1, width + 1, shape[:2])
    mask = np.arange(width)[None, None] < lengths[:, :, None]
    advantages = rng.standard_normal(shape[:2]) if advantage is None else advantage
    advantages = np.broadcast_to(advantages, shape[:2])
    return tuple(np.asarray(x, np.float32) for x in (logprobs, behaviour, advantages, mask))


def closed_form(logprobs, behaviour, advantages, mask, cap):
    """(loss, its gradient in logprobs), by M1's eq. 4-5 in float64."""
    logp, old, adv, mask = (x.astype(np.float64) for x in (logprobs, behaviour, advantages, mask))
    weight = np.minimum(np.exp(logp - old), cap)
    tokens = mask.sum((1, 2))
    value, grad = 0.0, np.zeros_like(logp)
    for g in np.flatnonzero(tokens):
        share = 1 / tokens[g] / np.count_nonzero(tokens)
        grad[g] = -share * weight[g] * adv[g][:, None] * mask[g]
        value += (grad[g] * logp[g]).sum()
    return value, grad


def check(loss, case):
    """Raises AssertionError unless value and gradient are the closed form's."""
    logprobs, *rest = case
    value, grad = jax.value_and_grad(lambda x: loss(x, *rest, CAP)[0])(jnp.asarray(logprobs))
    expected_value, expected_grad = closed_form(*case, CAP)
    scale = np.abs(expected_grad).max()
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-6 * scale)


RATIOS = {"below": 0.25, "just_below": 1.9, "at": CAP, "above": 8.0}


@pytest.mark.parametrize("advantage", [1.5, -0.7])
@pytest.mark.parametrize("ratio", RATIOS.values(), ids=RATIOS)
def test_cispo_at_one_ratio(ratio, advantage):
    check(cispo_loss, draw(ratio, advantage=advantage))


def test_cispo_with_all_ratios_and_signs_mixed():
    ratio = np.exp(np.random.default_rng(1).uniform(-2, 2, (3, 4, 6)))
    check(cispo_loss, draw(ratio))


def test_cispo_weight_has_no_lower_bound():
    case = draw(1e-4, advantage=-1.0)
    grad = jax.grad(lambda x: cispo_loss(x, *case[1:], CAP)[0])(jnp.asarray(case[0]))
    tokens = case[3].sum((1, 2))
    np.testing.assert_allclose(
        grad.sum((1, 2)), np.full(3, 1e-4 / 3), rtol=1e-5, err_msg=f"tokens {tokens}"
    )


def test_cispo_group_of_equal_lengths_by_hand():
    """One group, two samples of two tokens: -(1/4) Σ min(r, 2) Â log π."""
    logprobs = jnp.log(jnp.array([[[0.5, 0.5], [0.4, 0.1]]], jnp.float32))
    behaviour = jnp.log(jnp.array([[[0.5, 0.125], [0.8, 0.1]]], jnp.float32))
    advantages = jnp.array([[1.0, -1.0]], jnp.float32)
    loss, stats = cispo_loss(logprobs, behaviour, advantages, jnp.ones((1, 2, 2)), CAP)
    terms = 1 * np.log(0.5) + 2 * np.log(0.5) - 0.5 * np.log(0.4) - 1 * np.log(0.1)
    np.testing.assert_allclose(loss, -terms / 4, rtol=1e-6)
    np.testing.assert_allclose(stats.ratio_mean, (1 + 4 + 0.5 + 1) / 4, rtol=1e-6)
    np.testing.assert_allclose(stats.ratio_max, 4, rtol=1e-6)
    np.testing.assert_allclose(stats.capped, 1 / 4)


def masked_out(case, group):
    mask = case[3].copy()
    mask[group] = 0
    return (*case[:3], mask)


def test_cispo_fully_masked_group_counts_for_nothing():
    case = draw(np.exp(np.random.default_rng(2).uniform(-1, 1, (3, 4, 6))))
    without = masked_out(case, 1)
    check(cispo_loss, without)
    dropped = tuple(np.delete(x, 1, axis=0) for x in case)
    np.testing.assert_allclose(
        cispo_loss(*without, CAP)[0], cispo_loss(*dropped, CAP)[0], rtol=1e-6
    )


def test_cispo_without_any_token_is_zero():
    logprobs, *rest = draw(1.5)
    rest[2] = np.zeros_like(rest[2])
    value, grad = jax.value_and_grad(lambda x: cispo_loss(x, *rest, CAP)[0])(logprobs)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def test_cispo_sampler_gets_no_gradient():
    logprobs, behaviour, *rest = draw(0.7)
    grad = jax.grad(lambda x: cispo_loss(logprobs, x, *rest, CAP)[0])(behaviour)
    np.testing.assert_array_equal(grad, 0)


def group_mean(terms, mask):
    tokens = mask.sum((1, 2))
    groups = jnp.maximum((tokens > 0).sum(), 1).astype(jnp.float32)
    return -jnp.sum((terms * mask).sum((1, 2)) / jnp.maximum(tokens, 1)) / groups


def without_stop_gradient(logprobs, behaviour, advantages, mask, cap):
    weight = jnp.minimum(jnp.exp(logprobs - behaviour), cap)
    return group_mean(weight * advantages[:, :, None] * logprobs, mask), None


def ppo_clipping(logprobs, behaviour, advantages, mask, cap):
    """Clips the update: a token above the cap loses its gradient."""
    weight = jnp.minimum(jnp.exp(logprobs - behaviour), cap)
    return group_mean(weight * advantages[:, :, None], mask), None


def mean_of_sample_means(logprobs, behaviour, advantages, mask, cap):
    """GRPO's normalisation: each sample by its own length."""
    weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(logprobs - behaviour), cap))
    terms = weight * advantages[:, :, None] * logprobs * mask
    return -jnp.mean(terms.sum(-1) / jnp.maximum(mask.sum(-1), 1)), None


def mean_over_all_tokens(logprobs, behaviour, advantages, mask, cap):
    """One normaliser for the batch, so that long groups weigh more."""
    weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(logprobs - behaviour), cap))
    return -jnp.sum(weight * advantages[:, :, None] * logprobs * mask) / mask.sum(), None


def without_cap(logprobs, behaviour, advantages, mask, cap):
    return cispo_loss(logprobs, behaviour, advantages, mask, 1e9)


WRONG = [
    (without_stop_gradient, "below"),
    (ppo_clipping, "above"),
    (mean_of_sample_means, "below"),
    (mean_over_all_tokens, "below"),
    (without_cap, "above"),
]


@pytest.mark.parametrize(("wrong", "ratio"), WRONG, ids=[w.__name__ for w, _ in WRONG])
def test_the_check_refuses_a_wrong_loss(wrong, ratio):
    with pytest.raises(AssertionError):
        check(wrong, draw(RATIOS[ratio]))


def test_gradient_without_the_stop_gradient_has_the_wrong_sign():
    """r (1 + log π) Â below the cap: rewarded tokens with π < 1/e would be made less likely."""
    case = draw(0.5, advantage=1.0)
    right, wrong = (
        jax.grad(lambda x, f=loss: f(x, *case[1:], CAP)[0])(jnp.asarray(case[0]))
        for loss in (cispo_loss, without_stop_gradient)
    )
    unlikely = (case[0] < -1.1) & (case[3] > 0)
    assert unlikely.any()
    assert (right[unlikely] < 0).all()
    assert (wrong[unlikely] > 0).all()


def test_group_advantages_are_standardised_within_each_group():
    rewards = np.array([[1, 0, 0, 1], [0, 0, 0, 1]], np.float32)
    advantages, kept = group_advantages(jnp.asarray(rewards))
    expected = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)
    assert kept.all()


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_group_of_equal_rewards_is_dropped_without_nan(reward):
    rewards = jnp.array([[reward] * 3, [0, 1, 0]], jnp.float32)
    advantages, kept = group_advantages(rewards)
    np.testing.assert_array_equal(kept, [False, True])
    np.testing.assert_array_equal(advantages[0], 0)
    assert np.isfinite(advantages).all()


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(num_layers=2, layer_types=("lightning", "softmax")))


@pytest.mark.parametrize("positions", [1, 4, 7])
def test_token_logprobs_in_chunks(model, monkeypatch, positions):
    """14 positions in chunks that divide them and that do not; values and gradients."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 7, model.cfg.hidden_size)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, model.cfg.vocab_size, (2, 7)), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((2, 7)), jnp.float32)

    structure, params = nnx.split(model)

    def run():
        def loss(hidden, params):
            logp = token_logprobs(nnx.merge(structure, params), hidden, targets, temperature=0.8)
            return jnp.sum(logp * weights), logp

        (by_hidden, by_params), logp = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, params)
        return (by_hidden, by_params["head"]["kernel"][...]), logp

    whole_grads, whole = run()
    monkeypatch.setattr(losses, "_POSITIONS", positions)
    grads, chunked = run()
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    for actual, expected in zip(grads, whole_grads, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6 * float(jnp.abs(expected).max()))
    logp = jax.nn.log_softmax(model.logits(hidden) / 0.8)
    named = jnp.take_along_axis(logp, targets[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(whole, named, rtol=1e-5)


def test_cross_entropy_is_the_mean_over_the_mask():
    logprobs = jnp.array([[-1.0, -2.0], [-4.0, -8.0]])
    assert cross_entropy(logprobs, jnp.array([[1.0, 0.0], [1.0, 1.0]])) == (1 + 4 + 8) / 3
    assert cross_entropy(logprobs, jnp.zeros((2, 2))) == 0
