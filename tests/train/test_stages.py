"""Stages as data, and jobs that are killed on either side of a change of stage."""

import logging

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmjax.config import ConfigError
from tests.train.programs import assert_same, copied, lenient, problems_and_tokenizer
from train import job as job_module
from train import language
from train.config import build
from train.data.packing import Example
from train.data.pipeline import example_stream
from train.job import Job
from train.metrics import Metrics, read_metrics
from train.optimizer import learning_rate, make_optimizer
from train.stages import resolve

TOKENIZER = problems_and_tokenizer()[1]
SOURCES = [{"name": "short", "paths": ("a",), "weight": 3}, {"name": "long", "paths": ("b",)}]
STAGES = [
    {"name": "warm", "steps": 4, "sequence_length": 16, "batch_size": 8},
    {"name": "big", "tokens": 1000, "batch_size": 16, "learning_rate": 0.4, "decay": "linear"},
    {
        "name": "far",
        "tokens": 700,
        "sequence_length": 32,
        "batch_size": 8,
        "microbatches": 2,
        "rope_theta": 5e6,
        "weights": {"long": 1},
        "blend": True,
        "learning_rate": 0.1,
        "decay": "exponential",
        "router_aux_loss_coef": 0.0,
    },
]


def config(stages=STAGES, **changes):
    model = {"num_layers": 1, "layer_types": ("softmax",), "vocab_size": 300}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1}
    return ConfigDict(
        {
            "task": "pretrain",
            "stages": stages,
            "remat": "none",
            "model": model | small,
            "data": {"source": "text", "mixture": SOURCES},
            "optimizer": {"learning_rate": 0.8, "warmup_steps": 2},
            **changes,
        }
    )


def test_stages_take_over_what_they_do_not_set():
    warm, big, far = resolve(build(config()))
    assert [s.steps for s in (warm, big, far)] == [4, 4, 3]  # 1000 / 256 and 700 / 256, up
    assert [s.first for s in (warm, big, far)] == [0, 4, 8]
    assert (big.data.sequence_length, big.data.batch_size) == (16, 16)
    assert big.optimizer.microbatches == 1
    assert far.model == {"rope_theta": 5e6, "router_aux_loss_coef": 0.0}
    assert warm.model == big.model == {}
    assert far.from_weights == {"short": 3.0, "long": 1.0}
    assert [s.weight for s in far.data.mixture] == [0.0, 1.0]
    assert [s.weight for s in big.data.mixture] == [3.0, 1.0]


def test_steps_follow_from_the_stages():
    assert build(config()).steps == 11
    with pytest.raises(ConfigError, match="steps = 9, but the stages have 11"):
        build(config(steps=9))


def test_rate_goes_from_stage_to_stage():
    """Warm-up over two updates; 0.8, linearly to 0.4 over steps 4 to 8, then to 0.1 over three."""
    cfg = build(config())
    rate = learning_rate(cfg.optimizer, cfg.steps, resolve(cfg))
    seen = [float(rate(step)) for step in range(13)]
    falling = [0.8, 0.7, 0.6, 0.5]
    last = [0.4 * 0.25 ** (i / 3) for i in range(3)]
    assert seen == pytest.approx([0.4, 0.8, 0.8, 0.8, *falling, *last, 0.1, 0.1], rel=1e-5)


def test_cosine_falls_to_nothing_and_rises_again():
    stages = [
        {"name": "down", "steps": 4, "learning_rate": 0, "decay": "cosine"},
        {"name": "up", "steps": 4, "learning_rate": 0.4, "decay": "cosine"},
    ]
    cfg = build(config(stages, optimizer={"learning_rate": 0.8}))
    rate = learning_rate(cfg.optimizer, cfg.steps, resolve(cfg))
    turn = np.cos(np.pi / 4)
    falling = [0.8, 0.4 * (1 + turn), 0.4, 0.4 * (1 - turn)]
    rising = [0, 0.2 * (1 - turn), 0.2, 0.2 * (1 + turn), 0.4]
    assert [float(rate(i)) for i in range(9)] == pytest.approx(falling + rising, abs=1e-6)


def test_sizes_are_checked_before_steps_are_counted():
    with pytest.raises(ConfigError, match=r"data\.batch_size must be positive, got 0"):
        build(config([{"name": "x", "tokens": 100}], data={"mixture": SOURCES, "batch_size": 0}))


WRONG = [
    ({"name": "warm"}, "two stages are called 'warm'"),
    ({"steps": 0}, "stage 'x' needs steps or tokens, one of them above 0"),
    ({"tokens": 5}, "stage 'x' needs steps or tokens, one of them above 0"),
    ({"decay": "wsd"}, "decay 'wsd'; known: constant, cosine, linear, exponential"),
    ({"weights": {"medium": 1}}, "stage 'x' weighs medium; data.mixture has short, long"),
    ({"weights": {"short": "much"}}, "weights = {'short': 'much'} is no"),
    ({"blend": True}, "stage 'x' blends, but has no weights to go to"),
    ({"microbatches": 3}, "batch_size 8 is no multiple of optimizer.microbatches 3"),
    ({"batch_size": -8}, "stage 'x': batch_size must be 0 or above, got -8"),
    ({"rope_theta": -1.0}, "stage 'x': rope_theta must be 0 or above, got -1.0"),
    ({"weights": {"short": 0}}, "one above 0: {'short': 0.0}"),
    ({"weights": {"short": 2, "long": -1}}, "weights must not be negative"),
    ({"learning_rate": 0, "decay": "exponential"}, "'exponential' from 0.8 to 0 neither"),
    ({"rope_tetha": 1.0}, "unknown key its rope_tetha; did you mean its rope_theta"),
]


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_wrong_stage_is_refused(change, text):
    stage = {"name": "x", "steps": 2} | change
    with pytest.raises(ConfigError) as caught:
        build(config([STAGES[0], stage]))
    assert text in str(caught.value)


def test_stages_are_no_reinforcement():
    with pytest.raises(ConfigError, match="stages are for pretrain and sft"):
        build(config(task="cispo", data={"tasks": ("chain_sum",), "mixture": SOURCES}))
    with pytest.raises(ConfigError, match=r"optimizer\.decay 'cosine' beside stages"):
        build(config(optimizer={"decay": "cosine"}))


# Jobs. One optimizer for all of them, so that each stage's step is compiled once in this module.


class Killed(BaseException):
    """Ends a run wherever it is, as SIGKILL would."""


@pytest.fixture(scope="module")
def optimizer():
    cfg = build(config())
    return lenient(make_optimizer(cfg.optimizer, cfg.steps, (), resolve(cfg)))


def examples():
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 16, 200)
    return [Example.answering([], rng.integers(1, 290, n).tolist()) for n in sizes]


class Run:
    """A job whose second and third stages say what they were given of the one before."""

    def __init__(self, workdir, monkeypatch, optimizer, kill_at=None):
        monkeypatch.setattr(job_module, "make_optimizer", lambda *_: optimizer)
        self.made, self.told = [], []
        step = language.language_step

        def dying(graphdef, opt, state, *args):
            if kill_at is not None and int(state.step) + 1 == kill_at:
                raise Killed
            return step(graphdef, opt, state, *args)

        with monkeypatch.context() as patch:
            patch.setattr(language, "language_step", dying)
            patch.setattr(Metrics, "stage", lambda _, name, line: self.told.append(line))
            cfg = build(config(checkpoint={"every": 1, "keep": 2}, mesh={"data": 1}))
            self.job = Job(cfg, workdir, TOKENIZER, cfg.steps, jax.devices()[:1])
            language.fit(self.job, self.make)

    def make(self, cfg, *, steps, from_weights, after, rows):
        self.made.append((steps, from_weights, after))
        return example_stream(examples(), cfg, rows=rows)


class Compiled(logging.Handler):
    """How often XLA compiles a step while it is entered."""

    def __enter__(self):
        self.count, self.logger = 0, logging.getLogger("jax._src.interpreters.pxla")
        self.logging = jax.log_compiles()
        self.logging.__enter__()
        self.logger.addHandler(self)
        return self

    def emit(self, record):
        self.count += "Compiling jit(language_step)" in record.getMessage()

    def __exit__(self, *error):
        self.logger.removeHandler(self)
        self.logging.__exit__(*error)


def untimed(workdir):
    told = ("seconds/", "tokens_per_second/", "data/wait", "tflops", "mfu")
    return [{k: v for k, v in m.items() if not k.startswith(told)} for m in read_metrics(workdir)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, optimizer):
    workdir = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        with Compiled() as steps:
            run = Run(workdir, patch, optimizer)
        run.compiled = steps.count
    return run


@pytest.mark.slow
def test_each_stage_is_compiled_once(straight):
    assert straight.compiled == 3


@pytest.mark.slow
def test_stages_are_in_the_metrics_and_the_model(straight):
    stages = [m["stage"] for m in read_metrics(straight.job.workdir)]
    assert stages == [1] * 4 + [2] * 4 + [3] * 3
    assert straight.job.model.cfg.rope_theta == 5e6
    assert straight.job.model.cfg.router_aux_loss_coef == 0
    last = read_metrics(straight.job.workdir)[-1]
    assert last["total_loss"] == last["loss"]


@pytest.mark.slow
def test_streams_are_told_where_the_stage_before_ended(straight):
    (_, _, nothing), (_, none, first), (steps, weights, second) = straight.made
    assert nothing is None
    assert none is None
    assert steps == 3
    assert weights == {"short": 3.0, "long": 1.0}
    assert set(first) == set(second) == {"0"}
    assert first != second


LATER = [pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 9)]


@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 6, *LATER])
def test_killed_beside_a_change_of_stage_a_job_goes_on_the_same(
    at, straight, tmp_path, monkeypatch, optimizer
):
    """At the last step of a stage, at the first of the next one, and behind it."""
    with pytest.raises(Killed):
        Run(tmp_path, monkeypatch, optimizer, kill_at=at)
    with Compiled() as steps:
        again = Run(tmp_path, monkeypatch, optimizer)
    assert untimed(tmp_path) == untimed(straight.job.workdir)
    assert_same(copied(again.job.state.params), copied(straight.job.state.params))
    assert again.made[-1] == straight.made[-1]
    assert steps.count == 0


@pytest.mark.slow
def test_a_change_of_stage_is_told(straight):
    assert straight.told == [
        "stage 1 of 3, warm, steps 1 to 4; 8 x 16 tokens; RoPE base 10000; learning rate 0.8; "
        "short 75%, long 25%",
        "stage 2 of 3, big, steps 5 to 8; 16 x 16 tokens; RoPE base 10000; "
        "learning rate linear to 0.4; short 75%, long 25%",
        "stage 3 of 3, far, steps 9 to 11; 8 x 32 tokens in 2 microbatches; RoPE base 5e+06; "
        "learning rate exponential to 0.1; towards long 100%",
    ]


@pytest.mark.slow
def test_checkpoint_of_other_stages_is_refused(tmp_path, monkeypatch, optimizer):
    with pytest.raises(Killed):
        Run(tmp_path, monkeypatch, optimizer, kill_at=10)
    cfg = build(config(STAGES[:2], mesh={"data": 1}))
    job = Job(cfg, tmp_path, TOKENIZER, cfg.steps, jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"does not fit this job"):
        language.fit(job, lambda cfg, rows, **_: example_stream(examples(), cfg, rows=rows))
