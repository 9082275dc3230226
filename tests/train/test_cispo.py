"""CISPO's updates on real rollouts: sampler against trainer, dropped groups, whole groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.engine import SamplingParams
from mmjax.engine.generate import PromptError
from tests.train.programs import (
    adamw,
    assert_same,
    copied,
    problems_and_tokenizer,
    tiny_model,
)
from train.cispo import Batch, cispo_step, minibatches
from train.config import CispoConfig
from train.rollout import Rollouts, roll_out
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


def fresh():
    model = tiny_model(300)
    model.remat = "none"
    return init_state(model, OPTIMIZER, 0)


def rollouts(state, graphdef, seed):
    rng = np.random.default_rng(seed)
    chosen = [PROBLEMS[int(i)] for i in rng.choice(len(PROBLEMS), 4, replace=False)]
    done = roll_out(
        nnx.merge(graphdef, state.params),
        TOKENIZER,
        PROBLEMS,
        chosen,
        SamplingParams(CFG.max_new_tokens, CFG.temperature, eos_id=TOKENIZER.eos_id),
        jax.random.key(seed),
        samples=2,
        max_prompt_tokens=CFG.max_prompt_tokens,
    )
    # Random weights solve nothing, and a group without a difference would say nothing.
    return done._replace(rewards=np.array([[0, 1]] * 4, np.float32))


def update(graphdef, state, batch):
    return cispo_step(graphdef, OPTIMIZER, CFG, state, jax.tree.map(jnp.asarray, batch))


@pytest.fixture(scope="module")
def first():
    graphdef, state = fresh()
    return rollouts(state, graphdef, 0)


def test_sampler_and_trainer_agree_at_learning_rate_zero():
    graphdef, state = fresh()
    before = copied(state.params)
    for seed in range(3):
        for batch in minibatches(rollouts(state, graphdef, seed), CFG.updates_per_batch):
            assert batch.mask.sum() > 8
            state, metrics = update(graphdef, state, batch)
            assert metrics["logprob_drift"] <= 1e-4
            np.testing.assert_allclose(metrics["is_weight/mean"], 1, atol=1e-4)
            assert metrics["is_weight/capped"] == 0
            assert metrics["grad_norm"] > 0
    assert_same(copied(state.params), before)


def test_drift_shows_a_disagreement(first):
    """The test above could not pass by chance."""
    graphdef, state = fresh()
    batch = minibatches(first, 2)[0]
    _, metrics = update(graphdef, state, batch._replace(behaviour=batch.behaviour + 0.01))
    assert 0.009 < metrics["logprob_drift"] < 0.011


def test_update_without_a_kept_group_changes_no_bit(first):
    graphdef, state = fresh()
    before = copied(state)
    equal = first._replace(rewards=np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.float32))
    for batch in minibatches(equal, 2):
        assert batch.mask.sum() == 0
        state, metrics = update(graphdef, state, batch)
        assert metrics["loss"] == 0
    assert_same(copied(state), before)
    state, _ = update(graphdef, state, minibatches(first, 2)[0])
    after = copied(state)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True))


def test_prompt_longer_than_the_config_allows():
    with pytest.raises(PromptError, match=r"a prompt takes \d+ tokens.*max_prompt_tokens is 3"):
        roll_out(
            tiny_model(300),
            TOKENIZER,
            PROBLEMS,
            [PROBLEMS[0]],
            SamplingParams(4),
            jax.random.key(0),
            samples=1,
            max_prompt_tokens=3,
        )


# How rollouts are dealt out.


def made_up(rewards, seed=0):
    """Rollouts whose tokens tell group (hundreds), sample (tens) and place."""
    rng = np.random.default_rng(seed)
    groups, samples = rewards.shape
    width, longest = 5, 4
    place = np.arange(width)
    lengths = rng.integers(1, width + 1, (groups, samples))
    tokens = (
        1000
        + 100 * np.arange(groups)[:, None, None]
        + 10 * np.arange(samples)[None, :, None]
        + place
    ) * (place < lengths[:, :, None])
    prompt_lengths = rng.integers(1, longest + 1, groups)
    prompts = (1 + np.arange(groups))[:, None] * (np.arange(longest) < prompt_lengths[:, None])
    return Rollouts(
        prompts=prompts.astype(np.int32),
        prompt_lengths=prompt_lengths.astype(np.int32),
        tokens=tokens.astype(np.int32),
        behaviour=-(tokens / 1000).astype(np.float32),
        lengths=lengths.astype(np.int32),
        finished=np.ones((groups, samples), bool),
        rewards=rewards,
        failures=0,
        texts=[],
    )


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
    batches = minibatches(mixed, 4)
    assert len(batches) == 4
    assert sorted(np.concatenate([group_of(b) for b in batches])) == list(range(8))
    for batch in batches:
        for place, group in enumerate(group_of(batch)):
            for name in ("tokens", "behaviour", "lengths", "prompt_lengths"):
                np.testing.assert_array_equal(
                    getattr(batch, name)[place], getattr(mixed, name)[group]
                )


def test_groups_of_equal_rewards_are_masked_out(mixed):
    for batch in minibatches(mixed, 4):
        for place, group in enumerate(group_of(batch)):
            real = np.arange(5)[None] < mixed.lengths[group][:, None]
            kept = group not in (1, 3, 6)
            np.testing.assert_array_equal(batch.mask[place], real * kept)
            rewards = mixed.rewards[group]
            expected = (rewards - rewards.mean()) / rewards.std() if kept else 0 * rewards
            np.testing.assert_allclose(batch.advantages[place], expected, rtol=1e-5)


def test_groups_with_a_signal_are_dealt_out_evenly(mixed):
    counts = [int((b.mask.sum((1, 2)) > 0).sum()) for b in minibatches(mixed, 4)]
    assert sum(counts) == 5
    assert max(counts) - min(counts) <= 1


def test_sequences_are_prompt_and_completion_without_a_gap(mixed):
    for batch in minibatches(mixed, 4):
        for place, group in enumerate(group_of(batch)):
            start = mixed.prompt_lengths[group]
            for sample in range(3):
                row = batch.sequences[place, sample]
                np.testing.assert_array_equal(row[:start], mixed.prompts[group, :start])
                np.testing.assert_array_equal(row[start : start + 5], mixed.tokens[group, sample])
                np.testing.assert_array_equal(row[start + 5 :], 0)


def test_batches_are_of_one_shape(mixed):
    shapes = {tuple(x.shape for x in Batch(*b)) for b in minibatches(mixed, 4)}
    assert len(shapes) == 1
