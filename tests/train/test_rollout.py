"""The sampler on the engine: what it records, interruptions, penalties, weights that change."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mmjax.chat import THINK_END
from mmjax.config import ConfigError
from mmjax.engine import RequestError
from mmjax.engine.sample import CLOSING
from mmjax.sharding import make_mesh
from tests.train.programs import problems_and_tokenizer, tiny_model
from train.cispo_config import CispoConfig, SamplingConfig
from train.config import JobConfig
from train.rollout import (
    Asked,
    Sampler,
    check_prompts,
    encode_prompt,
    evaluate,
    overlong_penalty,
    passed,
    score,
    texts_of,
)

PROBLEMS, TOKENIZER = problems_and_tokenizer(8)
CFG = CispoConfig(
    prompts_per_batch=3, samples_per_prompt=4, max_prompt_tokens=96, max_new_tokens=24
)
SAMPLING = SamplingConfig(thinking_budget=5, overlong_tokens=8)


@pytest.fixture(scope="module")
def sampler():
    cfg = JobConfig("cispo", 1, cispo=CFG, sampling=SAMPLING)
    return Sampler(tiny_model(300), TOKENIZER, cfg, make_mesh(devices=jax.devices()[:1]))


def ask(sampler, number, prompt=None):
    """A group; without a prompt, one whose thinking is open."""
    prompt = TOKENIZER.encode("Go. <think>\n") if prompt is None else prompt
    return Asked(number, number, list(prompt), sampler.params(number, CFG.max_new_tokens))


@pytest.fixture(scope="module")
def groups(sampler):
    return sampler.sample([ask(sampler, n) for n in range(3)])


def test_groups_come_whole_and_in_order(groups):
    assert [g.number for g in groups] == [0, 1, 2]
    for group in groups:
        place = np.arange(group.tokens.shape[1])[None]
        past = place >= group.lengths[:, None]
        for name in ("tokens", "behaviour", "versions", "forced"):
            assert not getattr(group, name)[past].any(), name
        assert (group.behaviour[~past] < 0).all()
        assert len(set(map(tuple, group.tokens.tolist()))) > 1


def test_samples_of_a_group_share_one_prefill_and_its_bursts(sampler):
    before = sampler._engines[0].stats()
    sampler.sample([ask(sampler, 7, range(20, 60))])
    after = sampler._engines[0].stats()
    assert after.cached_prompt_tokens - before.cached_prompt_tokens == 3 * 39
    assert after.prompt_tokens - before.prompt_tokens == 4 * 40


def test_forced_tokens_are_those_that_closed_the_thinking(groups):
    closing = TOKENIZER.encode(CLOSING)
    seen = 0
    for group in groups:
        for tokens, forced, length in zip(group.tokens, group.forced, group.lengths, strict=True):
            open_still = length > 5 and THINK_END not in TOKENIZER.decode(tokens[:5])
            assert forced[:5].sum() == 0
            assert tokens[forced].tolist() == (closing[: length - 5] if open_still else [])
            seen += open_still
    assert seen > 6


def test_draws_depend_on_the_seed_alone(sampler, groups):
    again = sampler.sample([ask(sampler, 2), ask(sampler, 9), ask(sampler, 0)])
    for group, index in ((again[0], 2), (again[2], 0)):
        np.testing.assert_array_equal(group.tokens, groups[index].tokens)


def test_replicas_along_data_share_the_groups(groups):
    """On devices that are not the default one, where a job has its mesh in force, and with room for
    one sample or two at a time; other groups stay for the next step.
    """
    sampling = dataclasses.replace(SAMPLING, kv_tokens=128)
    cfg = JobConfig("cispo", 1, cispo=CFG, sampling=sampling)
    mesh = make_mesh({"data": 2}, jax.devices()[2:4])
    sampler = Sampler(tiny_model(300), TOKENIZER, cfg, mesh)
    for same in (True, False):
        sampler.add(ask(sampler, 3))
        with jax.set_mesh(mesh):
            again = sampler.sample([ask(sampler, n) for n in (1, 0, 2)])
        assert [g.number for g in again] == [1, 0, 2]
        for group in again:
            expected = groups[group.number]
            assert np.array_equal(group.tokens, expected.tokens) == same
            if same:  # but for the rounding of programs of other widths
                np.testing.assert_allclose(group.behaviour, expected.behaviour, atol=1e-5)
        while not (rest := sampler.step()):
            pass
        assert [g.number for g in rest] == [3]
        prompts = [engine.stats().prompt_tokens for engine in sampler._engines.values()]
        assert prompts[0] == prompts[1] > 0
        assert [engine.stats().pages_total for engine in sampler._engines.values()] == [2, 2]
        with jax.set_mesh(mesh):
            sampler.update(jax.tree.map(lambda x: x * 2, nnx.state(tiny_model(300))), 1)


def test_tokens_tell_the_weights_that_drew_them(sampler):
    params = nnx.state(tiny_model(300))
    sampler.update(params, 3)
    sampler.add(ask(sampler, 0))
    while not any(r.done[0].token_ids for r in sampler._running.values()):
        assert not sampler.step()
    sampler.update(params, 4)
    done = []
    while not done:
        done = sampler.step()
    versions = done[0].versions
    assert set(versions[:, 0]) == {3}
    assert versions.max() == 4
    assert (np.diff(versions[versions[:, -1] > 0], axis=1) >= 0).all()


def test_groups_that_end_during_an_evaluation_are_not_lost(sampler):
    sampler.add(ask(sampler, 5))
    answers = evaluate(sampler, TOKENIZER, PROBLEMS, SAMPLING, CFG.max_new_tokens)
    assert [g.problem for g in answers] == list(range(8))
    assert all(len(g.lengths) == 1 for g in answers)
    done = []
    while not done:
        done = sampler.step()
    assert [g.number for g in done] == [5]


def test_scores_come_by_component_and_long_ones_lose(sampler, groups):
    scored = score(groups, PROBLEMS, TOKENIZER, SAMPLING, CFG.max_new_tokens)
    for group in scored:
        assert set(group.components) == {"format", "correct", "overlong"}
        penalty = np.clip((group.lengths - 16) / 8, 0, 1)
        np.testing.assert_allclose(group.components["overlong"], -penalty, rtol=1e-6)
        expected = group.components["correct"] + group.components["overlong"]
        np.testing.assert_allclose(group.rewards, expected, rtol=1e-6)
        np.testing.assert_array_equal(passed(group), group.components["correct"])
    assert len(texts_of(scored[0], TOKENIZER)) == 4


def test_penalty_grows_linearly_to_its_most_at_the_limit():
    cfg = dataclasses.replace(SAMPLING, overlong_penalty=0.5)
    np.testing.assert_allclose(
        overlong_penalty(np.array([1, 16, 20, 24]), cfg, 24), [0, 0, 0.25, 0.5]
    )


def test_prompt_longer_than_the_config_allows(sampler):
    with pytest.raises(RequestError, match=r"takes 97 tokens, cispo.max_prompt_tokens is 96"):
        sampler.add(ask(sampler, 0, range(1, 98)))


def test_prompts_are_checked_before_a_job_samples():
    lengths = [len(encode_prompt(TOKENIZER, problem)) for problem in PROBLEMS]
    check_prompts(PROBLEMS, TOKENIZER, max(lengths))
    over = sum(n == max(lengths) for n in lengths)
    says = f"{over} of {len(lengths)} prompts take more, up to {max(lengths)} tokens of task 'cha"
    with pytest.raises(ConfigError, match=says):
        check_prompts(PROBLEMS, TOKENIZER, max(lengths) - 1)
