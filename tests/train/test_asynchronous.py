"""Sampling while training: bounded staleness, nothing lost, nothing twice."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from mmjax.config import ConfigError
from mmjax.sharding import make_mesh
from tests.train.killed_job import Problems, make_start, parity
from tests.train.killed_job import job as small_job
from tests.train.programs import adamw, assert_same, tiny_model
from train import cispo, rollout
from train import job as train_job
from train.asynchronous import Pipeline, pack_group, unpack_group
from train.cispo_config import AsynchronousConfig, CispoConfig, SamplingConfig
from train.config import JobConfig
from train.metrics import read_metrics
from train.rollout import Asked, Sampler

pytestmark = pytest.mark.slow

CFG = CispoConfig(prompts_per_batch=2, samples_per_prompt=2, max_prompt_tokens=8, max_new_tokens=20)


def make(sampler, staleness, rounds=1):
    """A pipeline whose prompts are numbered, and the numbers that it scored."""
    cfg = JobConfig(
        "cispo",
        1,
        cispo=CFG,
        sampling=SamplingConfig(rounds=rounds),
        asynchronous=AsynchronousConfig(max_staleness=staleness),
    )
    counter, scored = iter(range(1000)), []

    def ask(number, problem, limit):
        # Lengths differ, so that groups end out of order.
        return Asked(number, problem, [3, 4, 5 + number], sampler.params(number, limit))

    def finish(groups):
        scored.extend(g.number for g in groups)
        # Every third group says nothing.
        return [
            g._replace(rewards=np.array([0, g.number % 3 > 0], np.float32), components={})
            for g in groups
        ]

    def draw():
        number = next(counter)
        return ask(number, number, 3 + 17 * (number % 2))

    pipeline = Pipeline(sampler, cfg, draw, finish)
    pipeline.ask, pipeline.scored = ask, scored
    return pipeline


@pytest.fixture
def sampler():
    """On half of the devices; the model comes from the other half."""
    devices = jax.devices()
    model = tiny_model(300)
    params = jax.device_put(nnx.state(model), devices[0])
    mesh = make_mesh({"model": 1}, devices[4:5])
    cfg = JobConfig("cispo", 1, cispo=CFG)
    return Sampler(nnx.merge(nnx.graphdef(model), params), None, cfg, mesh)


def drive(pipeline, sampler, params, batches, start=0):
    """Batches with weights that come late, in the midst of sampling."""
    numbers, stale = [], []
    for trained in range(start, start + batches):
        calls = []

        def poll(calls=calls, trained=trained):
            calls.append(None)
            if len(calls) == 2 and sampler.version < trained:
                sampler.update(params, trained)

        groups = pipeline.batch(trained, poll)
        sampler.update(params, trained)
        numbers.append([g.number for g in groups])
        stale += [trained - int(g.versions[:, 0].min()) for g in groups]
    return numbers, stale


def test_batches_come_in_order_and_no_staler_than_allowed(sampler):
    params = nnx.state(tiny_model(300))
    pipeline = make(sampler, staleness=2)
    numbers, stale = drive(pipeline, sampler, params, 6)
    assert numbers == [[2 * i, 2 * i + 1] for i in range(6)]
    assert max(stale) == 2


def test_groups_without_a_signal_are_replaced_for_a_while(sampler):
    params = nnx.state(tiny_model(300))
    numbers, stale = drive(make(sampler, 1, rounds=3), sampler, params, 4)
    assert numbers == [[1, 2], [4, 5], [7, 8], [10, 11]]
    assert max(stale) <= 1


def test_saved_in_the_midst_nothing_is_lost_and_nothing_comes_twice(sampler):
    params = nnx.state(tiny_model(300))
    pipeline = make(sampler, staleness=3)
    before, _ = drive(pipeline, sampler, params, 2)
    state = json.loads(json.dumps(pipeline.get_state()))
    assert {type(x) for x in state["queue"]} == {str, list}, "some done, some under way"
    cfg = JobConfig("cispo", 1, cispo=CFG)
    mesh = make_mesh({"model": 1}, jax.devices()[4:5])
    other = Sampler(tiny_model(300), None, cfg, mesh)
    other.update(params, 2)
    resumed = make(other, staleness=3)
    resumed.set_state(state, resumed.ask)
    resumed._draw = lambda: resumed.ask(*(next(resumed_numbers),) * 2, 3)
    resumed_numbers = iter(range(4 + len(state["queue"]), 1000))
    after, _ = drive(resumed, other, params, 4, start=2)
    assert np.concatenate(before + after).tolist() == list(range(12))


def test_group_survives_its_text_to_the_bit(sampler):
    (group,) = sampler.sample([Asked(4, 2, [3, 4, 5], sampler.params(1, 6))])
    group = group._replace(
        rewards=np.array([0.1, 0.7], np.float32),
        components={"correct": np.array([0.1, 0.7], np.float32)},
    )
    again = unpack_group(json.loads(json.dumps(pack_group(group))))
    assert_same(again._asdict(), group._asdict())


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job on toy problems: four devices train, four sample."""
    monkeypatch.setattr(cispo, "split_problems", lambda *_: (Problems(100, 24), Problems(10, 4)))
    monkeypatch.setattr(rollout, "score_completions", parity)
    monkeypatch.setattr(train_job, "make_optimizer", lambda *_: adamw(learning_rate=1e-3))
    make_start(tmp_path)
    cfg = dataclasses.replace(
        small_job(tmp_path),
        steps=5,
        mesh={"data": 2, "expert": 1, "model": 2},
        asynchronous=AsynchronousConfig(max_staleness=1, sampler_devices=4),
    )
    return cfg, tmp_path / "run"


def test_job_on_split_devices_is_killed_and_goes_on(job, monkeypatch):
    cfg, workdir = job
    batches = {}
    notice = cispo.Loop._notice

    def note(self, taken):
        if self._step == 3 and 3 not in batches:
            batches[3] = None
            raise Killed
        batches[self._step] = [g.number for g in taken]
        metrics, rates = notice(self, taken), dict(self._curriculum.rates.tasks)
        again = notice(self, taken)
        assert again["groups_sampled"] == 0, "what was told once is not told again"
        assert "reward" not in again
        assert self._curriculum.rates.tasks == rates
        self._watched = metrics
        return metrics

    monkeypatch.setattr(cispo.Loop, "_notice", note)
    with pytest.raises(Killed):
        cispo.run(cfg, workdir)
    done = cispo.run(cfg, workdir)
    assert int(done.state.step) == 5
    devices = {d for x in jax.tree.leaves(done.state.params) for d in x.sharding.device_set}
    assert devices == set(jax.devices()[:4])
    numbers = np.concatenate([batches[step] for step in range(5)]).tolist()
    assert sorted(set(numbers)) == numbers, "none twice, and in order"
    history = read_metrics(workdir)
    assert [m["step"] for m in history] == [1, 2, 3, 4, 5]
    assert max(m["staleness/max"] for m in history) <= 1
    assert max(m["staleness/max"] for m in history) > 0
    # Before the first update the moved weights are the trainer's own.
    assert history[0]["staleness/max"] == 0
    assert history[0]["probability/correlation"] > 0.9999
    monkeypatch.setattr(cispo, "split_problems", lambda *_: (Problems(100, 25), Problems(10, 4)))
    with pytest.raises(ConfigError, match="its problems were others than these 25"):
        cispo.run(dataclasses.replace(cfg, steps=6), workdir)
