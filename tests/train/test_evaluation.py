"""Evaluation in the loop and by hand: scores, perplexities, what is written and drawn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax import Engine
from mmjax.config import ConfigError, ModelConfig
from mmjax.sharding import make_mesh
from tests.mmjax.programs import random_model, small_config
from tests.train.programs import lenient
from train.config import CheckpointConfig, DataConfig, EvaluationConfig, JobConfig
from train.evaluation.__main__ import main
from train.evaluation.lexicon import word_tokenizer
from train.evaluation.loop import by_position, evaluate, scalars
from train.evaluation.scoring import Prepared, Scorer, generated_hits
from train.evaluation.suite import Suite
from train.metrics import read_metrics
from train.optimizer import make_optimizer
from train.tasks import run_task

TOKENIZER = word_tokenizer()
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_kv_heads": 1}
TINY |= {"num_layers": 1, "layer_types": ("softmax",), "num_experts": 2}


@pytest.fixture(scope="module")
def model():
    cfg = small_config(
        num_layers=2, layer_types=("lightning", "softmax"), vocab_size=TOKENIZER.vocab_size
    )
    return random_model(cfg)


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(nnx.graphdef(model), make_mesh())


@pytest.fixture(scope="module")
def logits(model):
    """Logits of rows [8, 24]."""
    run = jax.jit(lambda tokens, segments: model(tokens, segment_ids=segments).logits)
    return lambda tokens, segments: np.asarray(run(jnp.asarray(tokens), jnp.asarray(segments)))


def test_teacher_forcing_says_what_greedy_decoding_does(model, scorer, logits):
    """Right where greedy decoding writes just this, wrong where one token is another."""
    tokens = np.zeros((8, 24), np.int32)
    tokens[:3, :6] = np.random.default_rng(0).integers(0, 500, (3, 6))
    for place in range(6, 12):
        real = np.broadcast_to(np.arange(24) < place, (8, 24)).astype(np.int32)
        tokens[:, place] = logits(tokens, real)[:, place - 1].argmax(-1)
    pairs = []
    for prompt, greedy in zip(tokens[:3, :6].tolist(), tokens[:3, 6:12].tolist(), strict=True):
        for changed in range(-1, 6):
            answer = [(t + 1) % 200 if i == changed else t for i, t in enumerate(greedy)]
            pairs.append((prompt, answer))
    hits = scorer.hits(nnx.state(model), Prepared(pairs, 24), tokens=8 * 24)
    assert hits.tolist() == [i % 7 == 0 for i in range(21)]


def test_generated_answers_need_the_values_in_any_words(model, monkeypatch):
    class Wrote:
        text = "They are Beta and 12, I think."

    monkeypatch.setattr(Engine, "generate", lambda self, prompts, params: [Wrote()] * len(prompts))
    values = [("12",), ("beta", "12"), ("12", "13"), ("gamma",)]
    shares = generated_hits(model, TOKENIZER, [[1, 2]] * 4, values, answer_tokens=3, slots=4)
    assert shares.tolist() == [1.0, 1.0, 0.5, 0.0]


def test_logprobs_are_those_of_the_logits(model, scorer, logits):
    tokens = np.random.default_rng(0).integers(0, 500, (8, 24)).astype(np.int32)
    segments = np.ones((8, 24), np.int32)
    segments[2, 10:] = 0
    found = scorer.logprobs(nnx.state(model), tokens, segments, 8 * 24)
    every = logits(tokens, segments)[:, :-1].astype(np.float64)
    every -= np.log(np.exp(every).sum(-1, keepdims=True))
    wanted = np.take_along_axis(every, tokens[:, 1:, None], axis=2)[..., 0]
    real = segments[:, 1:] != 0
    np.testing.assert_allclose(found[real], wanted[real], rtol=1e-5, atol=1e-5)


def test_loss_by_position_counts_real_tokens():
    logprobs = -np.arange(199, dtype=np.float32)[None].repeat(2, 0)
    segments = np.ones((2, 200), np.int32)
    segments[1, 100:] = 0
    text = by_position(logprobs, segments)
    parts = [(p["from"], p["to"], p["tokens"]) for p in text["by_position"]]
    assert parts == [(1, 64, 128), (65, 128, 64 + 35), (129, 199, 71)]
    assert text["by_position"][2]["loss"] == pytest.approx(np.mean(range(128, 199)))
    assert text["loss"] == pytest.approx((sum(range(199)) + sum(range(99))) / (199 + 99))


def test_batches_that_do_not_divide_lose_no_row(model, scorer, tmp_path):
    """Cells of one length go together, the last batch filled up; each share is of its own cell."""
    (tmp_path / "a.txt").write_text("The old baker follows the fox. " * 20)
    cfg = EvaluationConfig(
        tasks=("niah(digits=3)", "frequent_words"),
        lengths=(224, 256),
        depths=3,
        samples=3,
        paths=(str(tmp_path / "*.txt"),),
    )
    suite = Suite(cfg, TOKENIZER, chat=True)
    assert len(suite.prompts) == 2 * (3 * 3 + 9)
    right = iter([[1, 1, 1, 0, 0, 0, 1, 0, 0], [0] * 9, [0] * 8 + [1], [1] * 9])

    class Known(Scorer):
        def hits(self, params, rows, tokens):
            return np.array(next(right), bool)

    result = evaluate(suite, Known(nnx.graphdef(model), make_mesh()), nnx.state(model), 512)
    niah, words = result["tasks"].values()
    np.testing.assert_allclose(niah["accuracy"], [[1, 0], [0, 0], [1 / 3, 1 / 3]], atol=1e-6)
    assert words["accuracy"] == [[0.0, 1.0]]
    values = scalars(result)
    assert values["eval/niah(digits=3)/224"] == pytest.approx(4 / 9)
    assert values["eval/loss"] == pytest.approx(np.log(result["text"]["perplexity"]))


EVALUATION = EvaluationConfig(
    every=2, tasks=("niah(digits=3)",), lengths=(96, 128), depths=2, samples=1
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Three steps on the recall tasks, evaluated after the second and the last."""
    workdir = tmp_path_factory.mktemp("recall")
    cfg = JobConfig(
        "sft",
        3,
        model=ModelConfig.tiny(**TINY),
        remat="none",
        data=DataConfig("recall", tasks=("niah(digits=3)",), sequence_length=128),
        checkpoint=CheckpointConfig(export="hf"),
        evaluation=EVALUATION,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.job.make_optimizer", lambda *args: lenient(make_optimizer(*args)))
        run_task(cfg, workdir)
    return workdir


@pytest.mark.slow
def test_job_evaluates_every_so_often_and_at_its_end(job):
    evaluated = [m["step"] for m in read_metrics(job) if "eval/niah(digits=3)/128" in m]
    assert evaluated == [2, 3]
    folder = job / "evaluation"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"step_0000000{n}.{kind}" for n in (2, 3) for kind in ("json", "png")]
    table = json.loads((folder / names[0]).read_text())["tasks"]["niah(digits=3)"]
    assert table["lengths"] == [96, 128]
    assert table["depths"] == [0.0, 1.0]
    assert np.shape(table["accuracy"]) == (2, 2)


@pytest.mark.slow
def test_workdir_is_evaluated_by_hand(job, tmp_path, capsys):
    task = "niah(digits=3)"
    common = ["--model", str(job), "--task", task, "--depths", "2", "--samples", "1"]
    out = tmp_path / "out"
    assert main([*common, "--lengths", "96,128", "--out", str(out)]) == 0
    by_hand = json.loads((out / "result.json").read_text())
    in_the_loop = json.loads((job / "evaluation" / "step_00000003.json").read_text())
    assert by_hand == in_the_loop
    assert task in capsys.readouterr().out
    pictures = [f"{name}={out / 'result.json'}" for name in ("a", "b")]
    assert main(["--draw", str(tmp_path / "maps.svg"), "--trained", "96", *pictures]) == 0
    assert (tmp_path / "maps.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_engine_answers_and_text_is_measured_by_hand(job, tmp_path):
    (tmp_path / "a.txt").write_text("The old baker follows the fox. " * 12)
    common = ["--model", str(job), "--lengths", "128", "--depths", "1", "--samples", "1"]
    common += ["--out", str(tmp_path)]
    assert main([*common, "--task", "niah(digits=3)", "--generate"]) == 0
    assert main([*common, "--text", str(tmp_path / "a.txt")]) == 0
    text = json.loads((tmp_path / "result.json").read_text())["text"]
    assert [p["from"] for p in text["by_position"]] == [1, 65]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model names the folder"),
        (["--model", "nowhere"], "nowhere/tokenizer.json does not exist"),
        (["--model", "x", "--lengths", "1K"], "--lengths '1K' is no list of numbers"),
        (["--model", "x", "--depths", "0"], "evaluation.depths must be positive, got 0"),
        (["--draw", "x.png", "a=nowhere.json"], "nowhere.json is no result"),
        (["--draw", "x.png"], "--draw needs results"),
    ],
)
def test_wrong_arguments_end_in_one_message(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_workdir_without_a_model(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert main(["--model", str(tmp_path)]) == 2
    assert "--config.checkpoint.export=hf" in capsys.readouterr().err


def test_text_that_is_not_there(tmp_path):
    cfg = EvaluationConfig(lengths=(64,), paths=(str(tmp_path / "none*"),))
    with pytest.raises(ConfigError, match="matches no file"):
        Suite(cfg, TOKENIZER, chat=False)


def texts_of(folder, documents, rows):
    """First words of the stretches that are read of such documents, and how many there are."""
    for i, text in enumerate(documents):
        (folder / f"{i:03}.txt").write_text(text)
    cfg = EvaluationConfig(lengths=(32,), paths=(str(folder / "*.txt"),), rows=rows)
    texts = Suite(cfg, TOKENIZER, chat=False).texts
    return [TOKENIZER.decode(row[:1]) for row in texts.tokens], texts.segments.sum(1).tolist()


def test_whole_stretches_are_spread_over_all_documents(tmp_path):
    words = [f" {n}" * 31 for n in range(100, 115)]
    assert texts_of(tmp_path, words, 8)[0] == [
        f" {n}" for n in (100, 101, 103, 105, 107, 109, 111, 113)
    ]


def test_short_documents_are_read_where_whole_stretches_are_few(tmp_path):
    words = [" 100" * 3, " 101" * 31, " 102" * 7]
    assert texts_of(tmp_path, words, 8) == ([" 101", " 102", " 100"], [32, 8, 4])


def test_task_that_is_named_twice():
    cfg = EvaluationConfig(tasks=("niah", "multi_round", "niah"), lengths=(256,))
    with pytest.raises(ConfigError, match=r"evaluation\.tasks names niah more than once"):
        Suite(cfg, TOKENIZER, chat=True)
