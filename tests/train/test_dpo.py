"""Direct preference optimisation: its data, its loss in closed form, a job from end to end."""

import dataclasses
import io
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict
from rich.console import Console

import mmjax
from mmjax.config import ConfigError
from tests.mmjax.programs import forward
from tests.train.programs import adamw, assert_same, copied, lenient, tiny_model
from train import dpo
from train.config import DpoConfig, JobConfig, SourceConfig, build
from train.data.documents import Record, Source
from train.data.pipeline import encoder, make_stream
from train.data.preview import preview
from train.data.streams import counts
from train.data.tokenizer import train_tokenizer
from train.losses import dpo_loss
from train.optimizer import make_optimizer
from train.state import init_state

USER, CHAT = {"role": "user", "content": "hi"}, "chosen or rejected, blue or red"


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CHAT] * 3, 300)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(folder / "tokenizer")
    mmjax.save(
        tiny_model(tokenizer.vocab_size),
        folder / "model",
        tokenizer_from=folder / "tokenizer",
    )
    return folder / "model"


# The loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_in_closed_form(smoothing):
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 20, (2, 7)).astype(np.float32)
    beta = 0.3
    margin = beta * (chosen.astype(np.float64) - rejected)
    sigmoid = 1 / (1 + np.exp(-margin))
    expected = -(1 - smoothing) * np.log(sigmoid) - smoothing * np.log(1 - sigmoid)
    np.testing.assert_allclose(dpo_loss(chosen, rejected, beta, smoothing), expected, rtol=1e-4)
    grads = jax.grad(lambda c, r: dpo_loss(c, r, beta, smoothing).sum(), (0, 1))(chosen, rejected)
    slope = beta * (sigmoid - (1 - smoothing))
    np.testing.assert_allclose(grads[0], slope, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(grads[1], -slope, rtol=1e-4, atol=1e-7)


def test_metrics_in_closed_form():
    rng = np.random.default_rng(1)
    logprobs, reference = rng.normal(-9, 3, (2, 2, 3, 2)).astype(np.float32)
    lengths = rng.integers(1, 9, (2, 3, 2)).astype(np.float32)
    weights = np.array([[0.25, 0.25, 0.25], [0.25, 0, 0]], np.float32)
    cfg = DpoConfig(beta=0.5, length_normalised=True)
    found = dpo.preference_metrics(logprobs, reference, lengths, weights, cfg)
    real = (0.5 * (logprobs - reference) / lengths)[weights > 0]
    margin = real[:, 0] - real[:, 1]
    np.testing.assert_allclose(found["loss"], np.log1p(np.exp(-margin)).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["rewards/margin"], margin.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["rewards/accuracy"], (margin > 0).mean())
    np.testing.assert_allclose(found["rewards/chosen"], real[:, 0].mean(), rtol=1e-5)


# Data -------------------------------------------------------------------------------------------


def encoded(row, tokenizer, length=200, **source):
    cfg = SourceConfig("pairs", kind="preference", **source)
    data = dataclasses.replace(JobConfig("dpo", 1).data, sequence_length=length)
    return encoder(cfg, tokenizer, data)(Record(row, "row"))


def test_every_form_of_a_pair_is_the_same_example(tokenizer):
    forms = [
        {"prompt": "hi", "chosen": "blue", "rejected": "red"},
        {"prompt": [USER], "chosen": "blue", "rejected": "red"},
        {"prompt": "hi", "chosen": [says("blue")], "rejected": [says("red")]},
        {"chosen": [USER, says("blue")], "rejected": [USER, says("red")]},
        {"prompt": "hi", "chosen": [USER, says("blue")], "rejected": [USER, says("red")]},
    ]
    first, *others = [encoded(row, tokenizer) for row in forms]
    for example in others:
        for side in ("ids", "loss_mask"):
            np.testing.assert_array_equal(getattr(example, side), getattr(first, side))
            np.testing.assert_array_equal(
                getattr(example.rejected, side), getattr(first.rejected, side)
            )
    answer = np.asarray(first.ids)[np.asarray(first.loss_mask) == 1]
    assert tokenizer.decode(answer).startswith("blue")
    other = np.asarray(first.rejected.ids)[np.asarray(first.rejected.loss_mask) == 1]
    assert tokenizer.decode(other).startswith("red")
    assert first.size == max(len(first.ids), len(first.rejected.ids))


def test_turns_that_both_begin_with_are_only_read(tokenizer):
    start = [USER, says("hello"), {"role": "user", "content": "which?"}]
    row = {"chosen": [*start, says("blue")], "rejected": [*start, says("red")]}
    example = encoded(row, tokenizer)
    predicted = np.asarray(example.ids)[np.asarray(example.loss_mask) == 1]
    assert "hello" not in tokenizer.decode(predicted)
    assert "hello" in tokenizer.decode(np.asarray(example.ids))


@pytest.mark.parametrize(
    ("row", "kind", "text"),
    [
        ({"prompt": "hi", "chosen": "blue"}, "malformed", "'rejected' is None"),
        ({"chosen": "blue", "rejected": "red"}, "malformed", "there is no 'prompt'"),
        ({"prompt": 3, "chosen": "blue", "rejected": "red"}, "malformed", "row"),
        ({"prompt": "hi", "chosen": 3, "rejected": "red"}, "malformed", "'chosen' is 3"),
        ({"prompt": "hi", "chosen": [{}], "rejected": "red"}, "malformed", "role"),
        ({"prompt": "hi", "chosen": "red", "rejected": "red"}, "empty", "are the same"),
        ({"prompt": "hi", "chosen": [USER], "rejected": "red"}, "empty", "no turn of the assist"),
        ({"prompt": "hi", "chosen": "x" * 300, "rejected": "red"}, "too_long", "chosen takes 3"),
        ({"prompt": "hi", "chosen": "red", "rejected": "x" * 300}, "too_long", "rejected takes"),
    ],
)
def test_rows_that_are_no_pair(tokenizer, row, kind, text):
    found = encoded(row, tokenizer)
    assert found.kind == kind
    assert text in found.message


def pairs(count):
    sides = ("blue", "red")
    return [
        {
            "prompt": f"say {i} {'please ' * (i % 5)}",
            "chosen": f"{sides[0]} {i % 3}",
            "rejected": f"{sides[1]} {'now ' * (i % 4)}",
        }
        for i in range(count)
    ]


def job(tmp_path, rows, model="", **changes):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "task": "dpo",
        "steps": 6,
        "init_from": str(model),
        "remat": "layer",
        "data": {
            "mixture": ({"name": "pairs", "paths": (str(file),), "kind": "preference"},),
            "sequence_length": 96,
            "batch_size": 8,
            "pairs_per_row": 3,
            "bad_share": 0.5,
        },
        "dpo": {"beta": 0.5},
        "optimizer": {"learning_rate": 3e-3, "eps": 1e-8},
        "checkpoint": {"every": 2},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values[section] = values[section] | {key: value}
        else:
            values[section] = value
    return build(ConfigDict(values))


def test_rows_hold_pairs_side_by_side(tmp_path, tokenizer):
    cfg = job(
        tmp_path, [*pairs(40), {"chosen": "?"}, {"prompt": "a", "chosen": "b" * 99, "rejected": ""}]
    )
    stream = make_stream(cfg, tokenizer, steps=6)
    batches = [next(stream) for _ in range(6)]
    for batch in batches:
        assert 1 <= batch["segment_ids"].max() <= 3
        for row in range(8):
            last = batch["segment_ids"][row].max()
            assert batch["rejected_segment_ids"][row].max() == last
            for segment in range(1, last + 1):
                texts = []
                for side in ("", "rejected_"):
                    here = batch[f"{side}segment_ids"][row] == segment
                    ids = batch[f"{side}tokens"][row][here]
                    np.testing.assert_array_equal(
                        batch[f"{side}positions"][row][here], np.arange(len(ids))
                    )
                    texts.append(tokenizer.decode(ids))
                question = texts[0].partition("blue")[0]
                assert "blue" in texts[0]
                assert texts[1].startswith(question)
    told = counts(stream.get_state())
    assert told["pairs/malformed"] >= 1
    assert told["pairs/too_long"] >= 1
    assert not told["pairs/cut"]
    stream.close()


def test_preview_shows_both_answers(tmp_path, model_folder):
    out = io.StringIO()
    cfg = job(tmp_path, pairs(40), model_folder)
    preview(cfg, tmp_path, Console(file=out, width=100), rows=1, batches=1)
    assert "segment 1: " in out.getvalue()
    assert "segment 1, rejected: " in out.getvalue()
    assert "blue" in out.getvalue()
    assert "red" in out.getvalue()


def test_pairs_in_parquet(tmp_path, tokenizer):
    rows = pairs(3)
    table = pyarrow.table({name: [row[name] for row in rows] for name in ("prompt", "chosen")})
    pyarrow.parquet.write_table(table, tmp_path / "half.parquet")
    with pytest.raises(ConfigError, match="has no column 'rejected'"):
        Source(SourceConfig("pairs", (str(tmp_path / "half.parquet"),), kind="preference"))
    table = table.append_column("rejected", [[row["rejected"] for row in rows]])
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    cfg = SourceConfig("pairs", (str(tmp_path / "pairs.parquet"),), kind="preference")
    assert [Source(cfg)[i].row for i in range(3)] == rows


# The step ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tokenizer):
    cfg = job(tmp_path_factory.mktemp("data"), pairs(40))
    stream = make_stream(cfg, tokenizer, steps=6)
    batch = next(stream)
    stream.close()
    rng = np.random.default_rng(2)
    return batch | {"reference": rng.normal(-30, 3, (8, 3, 2)).astype(np.float32)}


def alone(batch):
    """The same pairs, each in a row of its own."""
    found = []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            one = {"reference": batch["reference"][row, segment - 1 : segment]}
            for side in ("", "rejected_"):
                here = batch[f"{side}segment_ids"][row] == segment
                for name in ("tokens", "segment_ids", "positions", "loss_mask"):
                    whole = np.zeros_like(batch["tokens"][0], batch[side + name].dtype)
                    values = batch[side + name][row][here]
                    whole[: len(values)] = np.ones_like(values) if name == "segment_ids" else values
                    one[side + name] = whole
            found.append(one)
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def test_logprobs_of_packed_pairs_are_those_of_each_answer_alone(packed, tokenizer):
    model = tiny_model(tokenizer.vocab_size)
    arrays = jax.tree.map(jnp.asarray, packed)
    found, lengths, _ = jax.jit(dpo.pair_logprobs, static_argnums=2)(model, arrays, 3)
    apart = alone(packed)
    place = 0
    for row in range(8):
        for segment in range(1, packed["segment_ids"][row].max() + 1):
            for k, side in enumerate(("", "rejected_")):
                tokens, real = apart[f"{side}tokens"][place], apart[f"{side}segment_ids"][place]
                logits = forward(model, jnp.asarray(tokens[None]), jnp.asarray(real[None])).logits
                logp = np.asarray(jax.nn.log_softmax(logits[0]))
                (at,) = np.nonzero(apart[f"{side}loss_mask"][place])
                expected = sum(logp[t - 1, tokens[t]] for t in at)
                np.testing.assert_allclose(found[row, segment - 1, k], expected, rtol=2e-5)
                assert lengths[row, segment - 1, k] == len(at)
            place += 1


def stepped(batch, tokenizer, microbatches=1, **loss):
    optimizer = adamw(learning_rate=1e-3, eps=1e-8)
    model = tiny_model(tokenizer.vocab_size)
    model.remat = "none"
    # The routers' loss is a mean over rows, whichever pairs they hold.
    cfg = dataclasses.replace(model.cfg, router_aux_loss_coef=0.0)
    model.cfg = cfg
    graphdef, state = init_state(model, optimizer, 0)
    arrays = jax.tree.map(jnp.asarray, batch)
    return dpo.dpo_step(
        graphdef, optimizer, DpoConfig(**loss), state, arrays, microbatches=microbatches
    )


def test_packing_and_microbatches_change_nothing(packed, tokenizer):
    state, metrics = stepped(packed, tokenizer, length_normalised=True)
    assert float(metrics["pairs"]) == packed["segment_ids"].max(axis=1).sum()
    apart = alone(packed)
    spare = -len(apart["tokens"]) % 4
    apart = {
        k: np.concatenate([x, np.zeros((spare, *x.shape[1:]), x.dtype)]) for k, x in apart.items()
    }
    for batch, parts in ((apart, 1), (packed, 4)):
        other, found = stepped(batch, tokenizer, parts, length_normalised=True)
        for name in ("loss", "grad_norm", "rewards/margin", "logprobs/chosen", "pairs"):
            np.testing.assert_allclose(found[name], metrics[name], rtol=1e-4, err_msg=name)
        for x, y in zip(jax.tree.leaves(other.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)


# A job ------------------------------------------------------------------------------------------


@pytest.fixture
def lenient_optimizer(monkeypatch):
    monkeypatch.setattr("train.job.make_optimizer", lambda *args: lenient(make_optimizer(*args)))


@pytest.mark.usefixtures("lenient_optimizer")
def test_a_job_learns_what_is_preferred_and_goes_on_exactly(tmp_path, model_folder, monkeypatch):
    cfg = job(tmp_path, pairs(40), model_folder, checkpoint__export="hf")
    straight = dpo.run(cfg, tmp_path / "straight")
    told = (tmp_path / "straight/metrics.jsonl").read_text()
    history = [json.loads(line) for line in told.splitlines()]
    assert history[0]["rewards/margin"] == pytest.approx(0, abs=1e-4)
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert history[-1]["rewards/accuracy"] > 0.95
    assert history[-1]["rewards/margin"] > 1
    assert history[-1]["loss"] < 0.5
    assert (tmp_path / "straight/model/config.json").exists()

    update = dpo.Updates.__call__

    def stopped(self, job, state, batch):
        if self._next == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, job, state, batch)

    monkeypatch.setattr(dpo.Updates, "__call__", stopped)
    assert dpo.run(cfg, tmp_path / "halted").stop_signal == signal.SIGTERM
    monkeypatch.setattr(dpo.Updates, "__call__", update)

    def computed(*_):
        raise AssertionError("the reference is there already")

    monkeypatch.setattr(dpo, "_note", computed)
    again = dpo.run(cfg, tmp_path / "halted")
    assert_same(copied(again.state), copied(straight.state))


class Reference:
    """Computes the reference of a job in a folder; `noted` says how many batches were done."""

    def __init__(self, tokenizer, monkeypatch, killed_after=None):
        self.tokenizer, self.noted, note = tokenizer, [], dpo._note

        def told(job, table, model, sums):
            note(job, table, model, sums)
            self.noted.append(len(sums))
            if len(sums) == killed_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(dpo, "_note", told)

    def __call__(self, cfg, folder):
        running = dpo.Job(cfg, folder, self.tokenizer, cfg.steps)
        self.noted.clear()
        return np.array(
            dpo.reference_logprobs(running, dpo.partial(make_stream, tokenizer=self.tokenizer))
        )


def test_the_reference_goes_on_after_a_kill(tmp_path, model_folder, tokenizer, monkeypatch):
    cfg = job(tmp_path, pairs(40), model_folder)
    with monkeypatch.context() as patch:
        whole = Reference(tokenizer, patch)(cfg, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Reference(tokenizer, patch, killed_after=2)(cfg, tmp_path / "killed")
    reference = Reference(tokenizer, monkeypatch)
    np.testing.assert_array_equal(reference(cfg, tmp_path / "killed"), whole)
    assert reference.noted == [4, 6]
    # Other data: from the start.
    assert (reference(dataclasses.replace(cfg, seed=1), tmp_path / "killed") != whole).any()
    assert reference.noted == [0, 2, 4, 6]


def test_the_reference_follows_the_contents_of_files(
    tmp_path, tokenizer, model_folder, monkeypatch
):
    """Of files that keep their names: one row of the data, the weights, and the table itself."""
    model, work = tmp_path / "model", tmp_path / "work"
    shutil.copytree(model_folder, model)
    cfg = job(tmp_path, pairs(40), model)
    reference = Reference(tokenizer, monkeypatch)
    first = reference(cfg, work)
    np.testing.assert_array_equal(reference(cfg, work), first)
    assert reference.noted == []

    rows = pairs(40)
    rows[7] = rows[7] | {"chosen": "green 1"}
    job(tmp_path, rows, model)  # Writes them.
    changed = reference(cfg, work)
    np.testing.assert_array_equal(changed, reference(cfg, tmp_path / "anew"))
    assert (changed != first).any()

    shutil.rmtree(model)
    other = tiny_model(tokenizer.vocab_size)
    other.norm.scale[...] = other.norm.scale[...] * 1.5
    mmjax.save(other, model, tokenizer_from=model_folder)
    moved = reference(cfg, work)
    assert reference.noted == [2, 4, 6]
    assert (moved != changed).any()

    table = work / "reference.npy"
    for damage in (
        table.unlink,
        lambda: np.save(table, moved[:, :1]),
        lambda: table.write_bytes(table.read_bytes()[:-64]),
        lambda: (work / "reference.json").write_text("{"),
    ):
        damage()
        np.testing.assert_array_equal(reference(cfg, work), moved)
        assert reference.noted == [2, 4, 6]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dpo__beta": 0.0}, "dpo.beta must be positive, got 0"),
        ({"dpo__label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"optimizer__z_loss": 1e-4}, "z_loss 0.0001 is for pretrain and sft"),
        (
            {"data__mixture": ({"name": "a", "paths": ("x",)},)},
            "kind = 'text'; known: 'preference'",
        ),
        ({"data__source": "reasoning", "data__tasks": ("chain_sum",)}, "dpo reads data.source"),
        ({"stages": ({"name": "a", "steps": 6},)}, "stages are for pretrain and sft"),
        ({"task": "sft"}, "kind = 'preference'; known: 'text', 'chat'"),
    ],
)
def test_what_is_refused(tmp_path, change, text):
    with pytest.raises(ConfigError, match=text):
        job(tmp_path, pairs(2), **change)


def test_a_model_to_start_from_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="set init_from"):
        dpo.run(job(tmp_path, pairs(2)), tmp_path / "job")
