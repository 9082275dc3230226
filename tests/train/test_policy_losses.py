"""Policy losses, normalisers, advantages: closed forms, and what others do differently."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.advantages import group_advantages, has_signal
from train.batches import Batch
from train.cispo import policy_loss, policy_stats
from train.cispo_config import NORMALISERS, CispoConfig
from train.policy_losses import agreement, cispo, clip_stats, token_weights

CAP = 2.0


def draw(ratio=None, *, advantage=None, groups=3, samples=4, width=6, seed=0):
    """A batch of groups of different token counts; every ratio and sign unless one is given."""
    rng = np.random.default_rng(seed)
    shape = (groups, samples, width)
    behaviour = -rng.uniform(0.1, 4, shape)
    ratio = np.exp(rng.uniform(-2, 2, shape)) if ratio is None else ratio
    lengths = rng.integers(1, width + 1, shape[:2]).astype(np.int32)
    mask = np.arange(width)[None, None] < lengths[:, :, None]
    mask[0, 0, 0] = False  # a token that was forced
    advantages = rng.standard_normal(shape[:2]) if advantage is None else advantage
    f32 = {
        "behaviour": behaviour,
        "anchor": behaviour,
        "mask": mask,
        "advantages": np.broadcast_to(advantages, shape[:2]),
    }
    nothing = np.zeros((groups, samples, 1), np.int32)
    batch = Batch(
        sequences=nothing,
        prompt_lengths=lengths,
        lengths=lengths,
        tokens=nothing,
        **{k: np.asarray(v, np.float32) for k, v in f32.items()},
    )
    return np.asarray(behaviour + np.log(ratio), np.float32), batch


def loss_and_grad(cfg, logprobs, batch):
    arrays = jax.tree.map(jnp.asarray, batch)
    share = token_weights(arrays.mask, arrays.lengths, cfg.loss.normaliser, cfg.max_new_tokens)
    return jax.value_and_grad(policy_loss)(jnp.asarray(logprobs), arrays, share, cfg)


# Closed forms in float64: the terms and their derivative in log π, then the weight of each token.


def cispo_terms(logp, old, adv, mask, cfg):
    ratio = np.exp(logp - old)
    weight = np.clip(ratio, cfg.is_weight_floor, cfg.is_weight_cap)
    if cfg.trust_low:
        weight[(adv > 0) & (ratio > 1 + cfg.trust_high)] = 0
        weight[(adv < 0) & (ratio < 1 - cfg.trust_low)] = 0
    return weight * adv * logp, weight * adv


def clipped_terms(logp, old, adv, mask, cfg):
    ratio = np.exp(logp - old)
    low, high = 1 - cfg.loss.clip_low, 1 + cfg.loss.clip_high
    free = ((adv > 0) & (ratio < high)) | ((adv < 0) & (ratio > low))
    value = np.where(free, ratio, np.where(adv > 0, high, low)) * adv
    return value, np.where(free, ratio * adv, 0)


def gspo_terms(logp, old, adv, mask, cfg):
    count = np.maximum(mask.sum(-1, keepdims=True), 1)
    mean = ((logp - old) * mask).sum(-1, keepdims=True) / count
    value, slope = clipped_terms(np.broadcast_to(mean, logp.shape), 0, adv, mask, cfg)
    # Each of a sample's tokens moves all of its terms by slope / count.
    return value, np.broadcast_to((slope * mask).sum(-1, keepdims=True) / count, logp.shape)


TERMS = {"cispo": cispo_terms, "gspo": gspo_terms}


def weights(how, mask, lengths, limit):
    """What each token's term is multiplied by."""
    group, sample = mask.sum((1, 2)), mask.sum(2)
    with np.errstate(divide="ignore"):
        shares = {
            "tokens": np.full(mask.shape, 1 / mask.sum()),
            "group_tokens": (1 / group / (group > 0).sum())[:, None, None],
            "sample": (1 / sample / (sample > 0).sum())[:, :, None],
            "prompt": (1 / lengths.sum(1) / len(mask))[:, None, None],
            "max_tokens": np.full(mask.shape, 1 / ((sample > 0).sum() * limit)),
        }
    return np.where(mask > 0, shares[how], 0)


def closed_form(cfg, logprobs, batch):
    logp, old = logprobs.astype(np.float64), batch.anchor.astype(np.float64)
    adv = np.broadcast_to(batch.advantages.astype(np.float64)[:, :, None], logp.shape)
    mask = batch.mask.astype(np.float64)
    value, slope = TERMS.get(cfg.algorithm, clipped_terms)(logp, old, adv, mask, cfg)
    share = weights(cfg.loss.normaliser, mask, batch.lengths, cfg.max_new_tokens)
    factor = 1.0
    if cfg.correction_cap:
        drift = np.exp(old - batch.behaviour.astype(np.float64))
        factor = np.minimum(drift, cfg.correction_cap)
    return -(value * share * factor).sum(), -slope * share * factor


def check(cfg, logprobs, batch):
    value, grad = loss_and_grad(cfg, logprobs, batch)
    expected, slope = closed_form(cfg, logprobs, batch)
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(grad, slope, rtol=2e-5, atol=1e-6 * np.abs(slope).max())


COMBINATIONS = [
    *itertools.product(["cispo", "grpo", "dapo"], NORMALISERS),
    ("dr_grpo", "max_tokens"),
    ("gspo", "sample"),
]


@pytest.mark.parametrize(("algorithm", "normaliser"), COMBINATIONS)
def test_loss_and_normaliser_match_their_closed_forms(algorithm, normaliser):
    cap = {"is_weight_cap": CAP} if algorithm == "cispo" else {}
    check(CispoConfig(algorithm=algorithm, normaliser=normaliser, **cap), *draw())


@pytest.mark.parametrize("advantage", [1.5, -0.7])
@pytest.mark.parametrize("ratio", [1e-4, 0.25, 1.9, CAP, 8.0])
def test_cispo_at_one_ratio(ratio, advantage):
    check(CispoConfig(is_weight_cap=CAP), *draw(ratio, advantage=advantage))


def test_cispo_with_a_floor():
    check(CispoConfig(is_weight_cap=CAP, is_weight_floor=0.5), *draw())


def test_cispo_with_the_unified_mask():
    check(CispoConfig(is_weight_cap=CAP, trust_low=0.3, trust_high=0.5), *draw())


def test_ratio_to_the_proximal_policy_with_a_capped_correction():
    logprobs, batch = draw()
    drift = np.random.default_rng(5).uniform(-1, 1, batch.anchor.shape).astype(np.float32)
    batch = batch._replace(anchor=batch.behaviour + drift)
    cfg = CispoConfig(is_weight_cap=CAP, anchor="proximal", correction_cap=1.5)
    check(cfg, logprobs, batch)
    check(CispoConfig(is_weight_cap=CAP, anchor="proximal"), logprobs, batch)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_group_without_a_signal_weighs_on_none_but_the_prompt_mean(normaliser):
    logprobs, batch = draw()
    mask = batch.mask.copy()
    mask[1] = 0
    batch = batch._replace(mask=mask)
    cfg = CispoConfig(is_weight_cap=CAP, normaliser=normaliser)
    check(cfg, logprobs, batch)
    without = Batch(*(np.delete(x, 1, axis=0) for x in batch))
    value = loss_and_grad(cfg, logprobs, batch)[0]
    alone = loss_and_grad(cfg, np.delete(logprobs, 1, axis=0), without)[0]
    share = 2 / 3 if normaliser == "prompt" else 1
    np.testing.assert_allclose(value, share * alone, rtol=1e-5)


def test_nothing_that_counts_is_no_loss():
    logprobs, batch = draw(1.5)
    batch = batch._replace(mask=np.zeros_like(batch.mask))
    for algorithm, normaliser in COMBINATIONS:
        value, grad = loss_and_grad(
            CispoConfig(algorithm=algorithm, normaliser=normaliser), logprobs, batch
        )
        assert value == 0
        np.testing.assert_array_equal(grad, 0)


def test_cispo_by_hand():
    """One group, two samples of two tokens: -(1/4) Σ min(r, 2) Â log π."""
    logprobs = np.log(np.array([[[0.5, 0.5], [0.4, 0.1]]], np.float32))
    behaviour = np.log(np.array([[[0.5, 0.125], [0.8, 0.1]]], np.float32))
    _, like = draw(1.0, groups=1, samples=2, width=2)
    batch = like._replace(
        behaviour=behaviour,
        anchor=behaviour,
        advantages=np.array([[1.0, -1.0]], np.float32),
        mask=np.ones((1, 2, 2), np.float32),
    )
    cfg = CispoConfig(is_weight_cap=CAP)
    loss, _ = loss_and_grad(cfg, logprobs, batch)
    stats = policy_stats(jnp.asarray(logprobs), jax.tree.map(jnp.asarray, batch), cfg)
    terms = 1 * np.log(0.5) + 2 * np.log(0.5) - 0.5 * np.log(0.4) - 1 * np.log(0.1)
    np.testing.assert_allclose(loss, -terms / 4, rtol=1e-6)
    np.testing.assert_allclose(stats["ratio/mean"], (1 + 4 + 0.5 + 1) / 4, rtol=1e-6)
    np.testing.assert_allclose(stats["ratio/max"], 4, rtol=1e-6)
    np.testing.assert_allclose(stats["clipped/positive"], 1 / 2)
    assert stats["clipped/negative"] == 0


# What other trainers do under the same name, see docs/reinforcement.md: each differs from the paper
# in a number that can be named.


def gradient(weight, logprobs, batch, normaliser="group_tokens"):
    """Of -J in log π, for a weight of each token that is a constant."""
    share = weights(normaliser, batch.mask, batch.lengths, 64)
    return -weight * batch.advantages[:, :, None] * share


def test_cap_of_five_is_absolute_and_not_one_plus_five():
    """NeMo-RL's 1 + 5 lets a token of ratio 5.5 weigh 5.5; verl's 1 + 0.2 binds at 1.2."""
    logprobs, batch = draw(5.5)
    _, ours = loss_and_grad(CispoConfig(is_weight_cap=5.0), logprobs, batch)
    for cap, factor in ((5.0, 1.0), (1 + 5.0, 1.1), (1 + 0.2, 0.24)):
        theirs = gradient(min(5.5, cap), logprobs, batch)
        np.testing.assert_allclose(theirs, factor * np.asarray(ours), rtol=1e-4, atol=1e-9)


def test_silent_lower_clamp_lifts_unlikely_tokens():
    """verl, slime, ROLL, NeMo-RL and SkyRL-tx clamp below by default: at ratio 0.01 the weight is
    0.8 instead of 0.01, eighty times as much, for tokens that the policy has already left.
    """
    logprobs, batch = draw(0.01)
    _, ours = loss_and_grad(CispoConfig(is_weight_cap=CAP), logprobs, batch)
    _, clamped = loss_and_grad(CispoConfig(is_weight_cap=CAP, is_weight_floor=0.8), logprobs, batch)
    np.testing.assert_allclose(clamped, 80 * np.asarray(ours), rtol=1e-4)


def test_sample_mean_weighs_tokens_of_long_samples_less():
    """slime's and ROLL's default: a token's weight depends on its own sample's length."""
    logprobs, batch = draw(1.0, advantage=1.0)
    _, ours = loss_and_grad(CispoConfig(), logprobs, batch)
    _, theirs = loss_and_grad(CispoConfig(normaliser="sample"), logprobs, batch)
    for group in range(3):
        tokens = batch.mask[group].sum(-1)
        assert len(set(tokens)) > 1
        real = batch.mask[group] > 0
        assert len(set(np.asarray(ours)[group][real].round(6))) == 1
        by_sample = np.asarray(theirs)[group].min(-1)
        np.testing.assert_allclose(by_sample * tokens, -1 / 12, rtol=1e-4)


def test_missing_stop_gradient_turns_the_sign():
    """EasyDeL 0.3.0: r (1 + log π) Â below the cap; rewarded tokens with π < 1/e become rarer."""
    logprobs, batch = draw(0.5, advantage=1.0)
    share = jnp.asarray(weights("group_tokens", batch.mask, batch.lengths, 64), jnp.float32)

    def without(x):
        weight = jnp.minimum(jnp.exp(x - batch.anchor), CAP)
        return -(weight * x * share).sum()

    _, right = loss_and_grad(CispoConfig(is_weight_cap=CAP), logprobs, batch)
    wrong = jax.grad(without)(jnp.asarray(logprobs))
    unlikely = (logprobs < -1.1) & (batch.mask > 0)
    assert unlikely.any()
    assert (np.asarray(right)[unlikely] < 0).all()
    assert (np.asarray(wrong)[unlikely] > 0).all()


def test_clipping_the_update_loses_the_gradient_that_cispo_keeps():
    logprobs, batch = draw(3.0, advantage=1.0)
    _, kept = loss_and_grad(CispoConfig(is_weight_cap=CAP), logprobs, batch)
    _, lost = loss_and_grad(CispoConfig(algorithm="dapo"), logprobs, batch)
    assert (np.asarray(kept)[batch.mask > 0] < 0).all()
    np.testing.assert_array_equal(lost, 0)


# Advantages, and what is watched.


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale):
    rewards = np.array([[1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 1]], np.float32)
    centred = rewards - rewards.mean(1, keepdims=True)
    root = np.sqrt(np.mean(centred[[0, 2]] ** 2))
    by = {"group": np.array([[0.5], [1], [3**0.5 / 4]]), "batch": root, "none": 1.0}
    np.testing.assert_allclose(group_advantages(rewards, scale), centred / by[scale], rtol=1e-5)
    assert has_signal(rewards).tolist() == [True, False, True]


def test_batch_without_any_signal_has_no_advantage():
    for scale in ("group", "batch", "none"):
        assert not group_advantages(np.full((2, 3), 0.1, np.float32), scale).any()


def test_clip_fractions_are_told_by_sign():
    advantages = jnp.array([[1.0, -1.0]])
    ratio = jnp.log(jnp.array([[[3.0, 1.0], [3.0, 0.1]]]))
    terms = cispo(ratio, jnp.zeros_like(ratio), advantages, cap=2.0, floor=0.5)
    stats = clip_stats(terms, advantages, jnp.array([[[1.0, 1.0], [0.0, 1.0]]]))
    assert stats["clipped/positive"] == 0.5
    assert stats["clipped/negative"] == 1


def test_agreement_is_pearsons_correlation_of_probabilities():
    logprobs, batch = draw()
    noisy = logprobs + np.float32(0.3) * np.random.default_rng(1).standard_normal(
        logprobs.shape
    ).astype(np.float32)
    real = batch.mask > 0
    stats = agreement(jnp.asarray(logprobs), jnp.asarray(noisy), jnp.asarray(batch.mask))
    a, b = np.exp(logprobs[real]), np.exp(noisy[real])
    np.testing.assert_allclose(stats["probability/correlation"], np.corrcoef(a, b)[0, 1], rtol=1e-4)
    np.testing.assert_allclose(stats["probability/difference_max"], np.abs(a - b).max(), rtol=1e-4)
    same = agreement(*(jnp.asarray(logprobs),) * 2, jnp.asarray(batch.mask))
    np.testing.assert_allclose(same["probability/correlation"], 1, rtol=1e-5)
    assert same["probability/difference_max"] == 0
