"""Updates on real rollouts: sampler against trainer, dropped groups, whole groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.sharding import make_mesh
from tests.train.programs import (
    adamw,
    assert_same,
    copied,
    problems_and_tokenizer,
    tiny_model,
)
from train.batches import Batch, bucket, by_sample, minibatches
from train.cispo import cispo_step, policy_logprobs, summary_of
from train.cispo_config import NORMALISERS, CispoConfig
from train.config import JobConfig
from train.rollout import Asked, Group, Sampler, encode_prompt
from train.state import init_state

CFG = CispoConfig(
    prompts_per_batch=4,
    samples_per_prompt=2,
    updates_per_batch=2,
    max_prompt_tokens=96,
    max_new_tokens=8,
    temperature=0.8,
)
PROBLEMS, TOKENIZER = problems_and_tokenizer()
# Moves its moments, but no parameter.
OPTIMIZER = adamw(learning_rate=0.0, weight_decay=0.1)


MOVING = adamw(learning_rate=1e-3, eps=1e-6)
ONE_UPDATE = dataclasses.replace(CFG, updates_per_batch=1)


def fresh(optimizer=OPTIMIZER, coefficient=None):
    model = tiny_model(300)
    model.remat = "none"
    if coefficient is not None:
        model.cfg = dataclasses.replace(model.cfg, router_aux_loss_coef=coefficient)
    return init_state(model, optimizer, 0)


@pytest.fixture(scope="module")
def sampler():
    mesh = make_mesh(devices=jax.devices()[:1])
    return Sampler(tiny_model(300), TOKENIZER, JobConfig("cispo", 1, cispo=CFG), mesh)


def rollouts(sampler, seed):
    chosen = [int(i) for i in np.random.default_rng(seed).choice(len(PROBLEMS), 4, replace=False)]
    groups = sampler.sample(
        [
            Asked(n, i, encode_prompt(TOKENIZER, PROBLEMS[i]), sampler.params(seed * 10 + n, 8))
            for n, i in enumerate(chosen)
        ]
    )
    # Random weights solve nothing, and a group without a difference would say nothing.
    return [g._replace(rewards=np.array([0, 1], np.float32)) for g in groups]


def on_device(batch):
    return jax.tree.map(jnp.asarray, by_sample(batch))


def update(graphdef, state, batch, **how):
    return cispo_step(graphdef, OPTIMIZER, CFG, state, on_device(batch), **how)


@pytest.fixture(scope="module")
def first(sampler):
    return rollouts(sampler, 0)


def test_sampler_and_trainer_agree_at_learning_rate_zero(sampler):
    graphdef, state = fresh()
    before = copied(state.params)
    for seed in range(3):
        sampler.update(state.params, seed)
        for batch in minibatches(rollouts(sampler, seed), CFG, 8):
            assert batch.mask.sum() > 8
            state, metrics = update(graphdef, state, batch)
            assert metrics["probability/log_difference_max"] <= 1e-4
            assert metrics["probability/correlation"] >= 0.99999
            np.testing.assert_allclose(metrics["ratio/mean"], 1, atol=1e-4)
            assert metrics["clipped/positive"] == metrics["clipped/negative"] == 0
            assert metrics["grad_norm"] > 0
    assert_same(copied(state.params), before)


def test_drift_shows_a_disagreement(first):
    """The test above could not pass by chance."""
    graphdef, state = fresh()
    batch = minibatches(first, CFG, 8)[0]
    _, metrics = update(graphdef, state, batch._replace(behaviour=batch.behaviour + 0.01))
    assert 0.009 < metrics["probability/log_difference_max"] < 0.011


def test_proximal_policy_is_the_sampler_before_the_first_update(first):
    graphdef, state = fresh()
    batch = on_device(minibatches(first, CFG, 8)[0])
    logp = policy_logprobs(graphdef, CFG, state.params, batch)
    np.testing.assert_allclose(logp * batch.mask, batch.behaviour * batch.mask, atol=1e-4)


def test_update_without_a_signal_or_with_a_broken_gradient_changes_no_bit(first):
    graphdef, state = fresh()
    before = copied(state)
    equal = [
        g._replace(rewards=np.full(2, r, np.float32))
        for g, r in zip(first, (0, 1, 1, 0), strict=True)
    ]
    for batch in minibatches(equal, CFG, 8):
        assert batch.mask.sum() == 0
        state, metrics = update(graphdef, state, batch)
        assert metrics["loss"] == 0
    whole = minibatches(first, CFG, 8)[0]
    state, metrics = update(graphdef, state, whole._replace(advantages=whole.advantages * np.nan))
    assert not np.isfinite(metrics["grad_norm"])
    assert_same(copied(state), before)
    state, _ = update(graphdef, state, whole)
    after = copied(state)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True))


def test_metrics_of_a_batch_are_of_the_updates_that_count():
    def update(loss, correlation, largest):
        values = {"loss": loss, "probability/correlation": correlation, "ratio/max": largest}
        return {name: jnp.float32(x) for name, x in values.items()}

    updates = [update(1, 0.9, 2), update(4, 0.5, 5), update(0, 1, 0)]
    told = summary_of(updates, np.array([1, 1, 0], np.float32))
    expected = {"loss": 2.5, "probability/correlation": 0.9, "ratio/max": 5, "updates": 2}
    assert told == pytest.approx(expected)
    updates[2]["loss"] = jnp.float32(jnp.nan)
    assert np.isnan(summary_of(updates, np.array([1, 1, 0], np.float32))["loss"])


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_microbatches_give_the_update_of_one_batch(sampler, normaliser):
    """Samples of four groups, lengths of their own, one of which says nothing."""
    lengths = np.arange(8).reshape(4, 2) % 5 + 1
    (whole,) = minibatches(rollouts(sampler, 3), ONE_UPDATE, 8)
    real = np.arange(8)[None, None] < lengths[:, :, None]
    mask = whole.mask * real
    mask[2] = 0
    whole = whole._replace(lengths=lengths.astype(np.int32), mask=mask)
    cfg = dataclasses.replace(ONE_UPDATE, normaliser=normaliser)
    results = []
    for parts in (1, 4):
        graphdef, state = fresh(MOVING, coefficient=0.0)  # a router balances within a part
        state, metrics = cispo_step(graphdef, MOVING, cfg, state, on_device(whole), parts)
        results.append((copied(state.params), metrics))
    (params, metrics), (others, same) = results
    assert metrics.keys() == same.keys()
    for name in metrics.keys() - {"router/aux_loss", "router/busiest"}:
        np.testing.assert_allclose(metrics[name], same[name], rtol=2e-4, atol=1e-6, err_msg=name)
    for a, b in zip(*map(jax.tree.leaves, (params, others)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    start = copied(fresh()[1].params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start)
    assert max(jax.tree.leaves(moved)) > 1e-4


# How rollouts are dealt out.


def made_up(rewards, seed=0):
    """Groups whose tokens tell group (hundreds), sample (tens) and place."""
    rng = np.random.default_rng(seed)
    groups = []
    for n, row in enumerate(rewards):
        lengths = rng.integers(1, 6, len(row)).astype(np.int32)
        width = lengths.max()
        real = np.arange(width)[None] < lengths[:, None]
        tokens = (1000 + 100 * n + 10 * np.arange(len(row))[:, None] + np.arange(width)) * real
        groups.append(
            Group(
                number=n,
                problem=0,
                prompt=np.full(rng.integers(1, 5), 1 + n, np.int32),
                tokens=tokens.astype(np.int32),
                behaviour=-(tokens / 1000).astype(np.float32),
                versions=np.zeros_like(tokens, dtype=np.int32),
                forced=real & (np.arange(width)[None] == 2),
                lengths=lengths,
                reasons=("stop",) * len(row),
                rewards=row,
                components={},
                failures=0,
            )
        )
    return groups


DEAL = CispoConfig(updates_per_batch=4, max_prompt_tokens=4, max_new_tokens=5)


@pytest.fixture
def mixed():
    """Groups 1, 3 and 6 of eight have equal rewards."""
    rewards = np.tile(np.array([0, 1, 1], np.float32), (8, 1))
    rewards[[1, 6]] = 0
    rewards[3] = 1
    return made_up(rewards)


def group_of(batch):
    return (np.asarray(batch.tokens)[:, 0, 0] - 1000) // 100


def test_minibatches_hold_every_group_once_and_whole(mixed):
    batches = minibatches(mixed, DEAL, 5)
    assert len(batches) == 4
    assert sorted(np.concatenate([group_of(b) for b in batches])) == list(range(8))
    for batch in batches:
        for place, number in enumerate(group_of(batch)):
            group = mixed[number]
            width = group.tokens.shape[1]
            np.testing.assert_array_equal(batch.lengths[place], group.lengths)
            np.testing.assert_array_equal(batch.tokens[place, :, :width], group.tokens)
            np.testing.assert_array_equal(batch.behaviour[place, :, :width], group.behaviour)
            assert (batch.prompt_lengths[place] == len(group.prompt)).all()


def test_what_says_nothing_and_what_was_forced_is_masked_out(mixed):
    for batch in minibatches(mixed, DEAL, 5):
        for place, number in enumerate(group_of(batch)):
            group = mixed[number]
            real = np.arange(5)[None] < group.lengths[:, None]
            real[:, 2] = False
            kept = number not in (1, 3, 6)
            np.testing.assert_array_equal(batch.mask[place], real * kept)
            rewards = group.rewards
            expected = (rewards - rewards.mean()) / rewards.std() if kept else 0 * rewards
            np.testing.assert_allclose(batch.advantages[place], expected, rtol=1e-5)


def test_groups_with_a_signal_are_dealt_out_evenly(mixed):
    counts = [int((b.advantages != 0).any(1).sum()) for b in minibatches(mixed, DEAL, 5)]
    assert sum(counts) == 5
    assert max(counts) - min(counts) <= 1


def test_sequences_are_prompt_and_completion_without_a_gap(mixed):
    for batch in minibatches(mixed, DEAL, 5):
        for place, number in enumerate(group_of(batch)):
            group = mixed[number]
            start, width = len(group.prompt), group.tokens.shape[1]
            for row, tokens in zip(batch.sequences[place], group.tokens, strict=True):
                np.testing.assert_array_equal(row[:start], group.prompt)
                np.testing.assert_array_equal(row[start : start + width], tokens)
                np.testing.assert_array_equal(row[start + width :], 0)


def test_batches_are_of_one_shape(mixed):
    assert len({tuple(x.shape for x in Batch(*b)) for b in minibatches(mixed, DEAL, 5)}) == 1


def test_batches_are_as_wide_as_the_longest_completion_needs(mixed):
    assert [bucket(n, 4, 64) for n in (1, 16, 17, 64)] == [16, 16, 32, 64]
    assert [bucket(n, 3, 64) for n in (22, 23, 64)] == [22, 44, 64]
    wide = dataclasses.replace(DEAL, max_new_tokens=40, length_buckets=8)
    assert minibatches(mixed, wide, 40)[0].tokens.shape[-1] == 5


def test_sampler_keeps_weights_that_the_trainer_gave_away(sampler):
    _, state = fresh()
    sampler.update(state.params, 7)
    jax.tree.map(lambda x: x.delete(), state.params)
    assert sampler.sample([Asked(0, 0, [5, 6], sampler.params(1, 4))])[0].versions.max() == 7
