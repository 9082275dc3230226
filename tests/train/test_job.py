"""The loop that every task runs in, with steps that cost nothing; and jobs that never start."""

import dataclasses
import os
import signal
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.config import ConfigError, ModelConfig
from mmjax.sharding import ShardingError, ShardingRules, make_mesh
from tests.train.programs import assert_same, problems_and_tokenizer, tiny_model
from train.cispo import _reached
from train.config import CheckpointConfig, DataConfig, JobConfig
from train.job import Job, settled, with_config
from train.metrics import read_metrics
from train.state import TrainState
from train.tasks import run_task

TOKENIZER = problems_and_tokenizer()[1]


class Killed(BaseException):
    """Ends a run wherever it is, as SIGKILL would."""


class Run:
    """A job without a model: its parameter adds up the data, its metrics tell the sum."""

    def __init__(self, workdir, steps=10, every=3, step=None):
        self.job = object.__new__(Job)
        self.job.cfg = JobConfig("sft", steps, checkpoint=CheckpointConfig(every=every, keep=99))
        self.job.workdir, self.job.tokenizer = workdir, TOKENIZER
        self.job.mesh, self.job.stop_signal = make_mesh({"data": 8}), None
        self.job.stop_reason = None
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, {"sum": zero}, (), jax.random.key_data(jax.random.key(0)))
        self.job.state = self.job._replicate_scalars(state)
        self.extra = step or (lambda number: {})

    def go(self, **options):
        rows = grain.MapDataset.range(1000).seed(0).shuffle()
        data = iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
        self.job.run(data, self.step, **options)
        return self

    def step(self, state, item):
        number = int(state.step) + 1
        total = state.params["sum"] + int(item)
        metrics = {"sum": total.astype(jnp.float32), **self.extra(number)}
        return state._replace(step=state.step + 1, params={"sum": total}), metrics

    @property
    def steps(self):
        return [m["step"] for m in read_metrics(self.job.workdir)]

    @property
    def checkpoints(self):
        return sorted(int(p.name) for p in (self.job.workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("straight")).go()


def test_every_step_is_logged_and_every_third_saved(straight):
    assert straight.steps == list(range(1, 11))
    assert straight.checkpoints == [3, 6, 9, 10]


def killing(at):
    def step(number):
        if number == at:
            raise Killed
        return {}

    return step


@pytest.mark.parametrize("at", [1, 4, 5, 7, 10])
def test_killed_job_resumes_from_its_last_checkpoint(straight, tmp_path, at):
    with pytest.raises(Killed):
        Run(tmp_path, step=killing(at)).go()
    again = Run(tmp_path).go()
    assert read_metrics(tmp_path) == read_metrics(straight.job.workdir)
    assert again.job.state.params == straight.job.state.params


def test_step_is_in_the_metrics_before_its_checkpoint_is_written(tmp_path, monkeypatch):
    """Killed right after it, the job resumes behind the step and could never log it."""
    logged = []
    monkeypatch.setattr(
        "train.checkpoint.Checkpoints.save",
        lambda self, state, data: logged.append((int(state.step), Run.steps.fget(run)[-1])),
    )
    run = Run(tmp_path)
    run.go()
    assert logged == [(3, 3), (6, 6), (9, 9), (10, 10)]


def test_line_cut_short_by_a_kill_is_written_again(straight, tmp_path):
    with pytest.raises(Killed):
        Run(tmp_path, step=killing(6)).go()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "su')
    Run(tmp_path).go()
    expected = (straight.job.workdir / "metrics.jsonl").read_bytes()
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_job_after_the_step_with_a_checkpoint(straight, tmp_path, number):
    def step(at):
        if at == 5:
            os.kill(os.getpid(), number)
        return {}

    before = signal.getsignal(number)
    run = Run(tmp_path, step=step).go()
    assert run.job.stop_signal == number
    assert signal.getsignal(number) is before
    assert run.steps == [1, 2, 3, 4, 5]
    assert run.checkpoints == [3, 5]
    Run(tmp_path).go()
    assert read_metrics(tmp_path) == read_metrics(straight.job.workdir)


def test_step_can_stop_the_job_with_a_checkpoint(straight, tmp_path):
    run = Run(tmp_path)

    def step(at):
        run.job.stop_reason = "entropy collapsed" if at == 5 else None
        return {}

    run.extra = step
    run.go()
    assert run.steps == [1, 2, 3, 4, 5]
    assert run.checkpoints == [3, 5]
    Run(tmp_path).go()
    assert read_metrics(tmp_path) == read_metrics(straight.job.workdir)


def test_a_job_sets_what_the_parameters_it_starts_from_leave_open():
    model = tiny_model(48)
    asked = {"dtype": "bfloat16", "rope_theta": 5e6, "router_aux_loss_coef": 0.5}
    same = {"vocab_size": 40, "hidden_size": model.cfg.hidden_size, "initializer_range": 1.0}
    cfg = settled(model.cfg, asked | same, Path("start"))
    assert cfg == dataclasses.replace(model.cfg, **asked)
    assert settled(model.cfg, same, Path("start")) == model.cfg
    narrow = with_config(model, cfg)
    assert narrow.cfg == cfg
    out = jax.eval_shape(lambda: narrow(jnp.zeros((1, 4), jnp.int32)))
    assert out.hidden.dtype == jnp.bfloat16
    assert_same(nnx.state(narrow), nnx.state(model))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"hidden_size": 96}, r"another model than model.hidden_size 96 \(there 24\); leave"),
        ({"vocab_size": 49}, r"model.vocab_size 49 \(there 48\)"),
        ({"vision.num_layers": 2}, r"model.vision.num_layers 2 \(there None\)"),
    ],
)
def test_a_job_does_not_set_what_the_parameters_say(asked, says):
    with pytest.raises(ConfigError, match=says):
        settled(tiny_model(48).cfg, asked, Path("start"))


def test_finished_job_does_nothing_more(tmp_path):
    Run(tmp_path, steps=4).go()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    Run(tmp_path, steps=4, step=killing(5)).go()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_longer_job_goes_on(straight, tmp_path):
    Run(tmp_path, steps=4).go()
    Run(tmp_path).go()
    assert read_metrics(tmp_path) == read_metrics(straight.job.workdir)


def rising(number):
    """Evaluated every second step; the target of 0.5 is reached at step 6."""
    return {"eval/accuracy": number / 12} if number % 2 == 0 else {}


def reached(metrics):
    return _reached(metrics, target=0.5)


@pytest.mark.parametrize("every", [2, 3, 5, 100])
def test_job_that_reached_its_target_is_done_for_good(tmp_path, every):
    """Started again it does no further step, which a straight run would not have done either."""
    for _ in range(2):
        run = Run(tmp_path, every=every, step=rising).go(finish_early=reached)
        assert run.steps == [1, 2, 3, 4, 5, 6]
        assert run.checkpoints[-1] == 6


def test_checkpoint_of_another_model_is_refused(tmp_path):
    Run(tmp_path, steps=2).go()
    other = Run(tmp_path, steps=4)
    other.job.state = other.job.state._replace(params={"total": jnp.zeros((), jnp.int32)})
    with pytest.raises(ConfigError, match=r"checkpoint 2 .* does not fit this job"):
        other.go()


def test_batch_that_the_mesh_does_not_divide(tmp_path):
    job = Run(tmp_path).job
    with pytest.raises(ConfigError, match=r"batch of 3 rows does not divide .* 8"):
        job.put({"tokens": np.zeros((3, 4), np.int32)})


def test_parameters_and_moments_lie_as_the_config_says(tmp_path):
    model = ModelConfig.tiny(num_layers=2, layer_types=("lightning", "softmax"))
    rules = ShardingRules(vocab=("data",), d_model=(), tensors=(("head.*", ((), ("model",))),))
    cfg = JobConfig("sft", 1, model=model, mesh={"data": 4, "model": 2}, sharding=rules)
    state = Job(cfg, tmp_path, TOKENIZER, 1).state
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        name = jax.tree_util.keystr(path)
        for part, spec in {"embedding": P("data", None), "head": P(None, "model")}.items():
            if part in name:
                found.setdefault(part, []).append(
                    x.sharding.is_equivalent_to(NamedSharding(x.sharding.mesh, spec), x.ndim)
                )
    assert found == {"embedding": [True] * 3, "head": [True] * 3}


# Jobs that never start.

REASONING = DataConfig("reasoning", tasks=("chain_sum",), size=20)


def refused(workdir, error, text, **changes):
    with pytest.raises(error, match=text):
        run_task(JobConfig(steps=2, **{"task": "sft", "data": REASONING} | changes), workdir)
    assert not (workdir / "checkpoints").exists()


def test_cispo_without_a_model_to_start_from(tmp_path):
    refused(tmp_path, ConfigError, "set init_from to its folder", task="cispo")


def test_unknown_reasoning_task(tmp_path):
    data = DataConfig("reasoning", tasks=("chain_sums",))
    refused(tmp_path, ConfigError, "unknown reasoning task.*chain_sums", data=data)


def test_solution_longer_than_a_row(tmp_path):
    data = DataConfig("reasoning", tasks=("chain_sum",), size=20, sequence_length=20)
    refused(tmp_path, ConfigError, "a worked solution takes .*sequence_length is 20", data=data)


def test_mesh_of_another_number_of_devices(tmp_path):
    refused(tmp_path, ShardingError, "needs 3 devices, there are 8", mesh={"data": 3})


def test_unknown_mesh_axis(tmp_path):
    refused(tmp_path, ShardingError, "unknown mesh axis .*date", mesh={"date": 8})


def test_mesh_that_does_not_divide_the_model(tmp_path):
    model = ModelConfig.tiny(num_layers=1, layer_types=("softmax",), num_kv_heads=4)
    refused(
        tmp_path,
        ShardingError,
        "does not divide the model: .*of size 4 over model=8",
        mesh={"model": 8},
        model=model,
    )
