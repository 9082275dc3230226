"""Packed rows: their shape, that no token is lost or doubled, how full they are, exact resume."""

import dataclasses
import itertools
import json
from collections import Counter
from contextlib import closing
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmjax.config import ConfigError
from mmjax.tokenizer import BOS, EOS
from tests.train.data.test_documents import write_jsonl
from train.config import DataConfig, JobConfig, SourceConfig
from train.data.examples import Example, Skipped
from train.data.mixture import BlockShuffle, Mixture, Pool, _cut, ordered
from train.data.packing import PackedRows
from train.data.pipeline import Held, example_stream, make_stream
from train.data.streams import Streams, counts
from train.data.tokenizer import train_tokenizer
from train.evaluation.lexicon import word_tokenizer

LENGTH = 16


def documents(sizes, start=1):
    """Of such lengths, no two tokens of which are alike, so that a token tells its document."""
    out = []
    for size in sizes:
        ids = np.arange(start, start + size)
        out.append(Example(ids, ids % 2))
        start += size
    return out


def some(count=40):
    return documents(np.random.default_rng(0).integers(1, LENGTH + 1, count).tolist())


def batches(seed=0, examples=None, **data):
    data = DataConfig(**{"sequence_length": LENGTH, "batch_size": 4} | data)
    return example_stream(examples or some(), JobConfig("sft", 100, seed=seed, data=data))


def segments(batch):
    """(tokens, loss_mask, positions) of every document in a batch."""
    for row in range(batch["tokens"].shape[0]):
        ids = batch["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            yield tuple(
                batch[name][row][here].tolist() for name in ("tokens", "loss_mask", "positions")
            )


def same(batch, other):
    assert set(batch) == set(other)
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name])


def test_packed_rows_have_the_shapes_and_dtypes_of_a_step():
    batch = next(batches())
    for name in ("tokens", "segment_ids", "positions"):
        assert batch[name].shape == (4, LENGTH)
        assert batch[name].dtype == np.int32
    assert batch["loss_mask"].dtype == np.float32


def test_segments_count_from_one_and_padding_is_zero():
    for batch in itertools.islice(batches(), 10):
        for ids, row in zip(batch["segment_ids"], batch["tokens"], strict=True):
            real = ids[ids != 0]
            np.testing.assert_array_equal(ids, np.pad(real, (0, LENGTH - len(real))))
            assert set(np.diff(np.concatenate([[0], real]))) <= {0, 1}
            np.testing.assert_array_equal(ids == 0, row == 0)
        np.testing.assert_array_equal(batch["loss_mask"][batch["segment_ids"] == 0], 0)


def test_positions_restart_and_the_mask_stays_with_its_token():
    for batch in itertools.islice(batches(), 10):
        for tokens, mask, positions in segments(batch):
            assert positions == list(range(len(tokens)))
            assert mask == [t % 2 for t in tokens]


def test_no_token_is_lost_or_doubled():
    """Documents come whole, in each epoch once."""
    seen, stream = Counter(), batches(streams=2)
    for batch in itertools.islice(stream, 90):
        seen.update(tuple(tokens) for tokens, _, _ in segments(batch))
    assert set(seen) == {tuple(e.ids.tolist()) for e in some()}
    assert min(seen.values()) > 5


def test_epochs_are_shuffled_anew_and_by_the_seed():
    first, second = (next(batches(seed))["tokens"] for seed in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(next(batches(0))["tokens"], first)


@pytest.mark.parametrize("done", [0, 1, 7, 33])
def test_iterator_resumes_where_it_was_saved(done):
    running = batches()
    for _ in range(done):
        next(running)
    state = json.loads(json.dumps(running.get_state()))
    resumed = batches()
    resumed.set_state(state)
    for _ in range(20):
        same(next(resumed), next(running))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"streams": 1}, r"data\.streams was 2 and is 1"),
        ({"streams": 4}, r"data\.streams was 2 and is 4"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"examples": some(41)}, "data source 'text' had 40 rows and has 41"),
        ({"source": "recall"}, "'recall' had 0 rows and has 40; .*'text' had 40 rows and has 0"),
    ],
)
def test_state_of_other_data_is_refused(changes, says):
    with closing(batches(streams=2)) as running:
        next(running)
        state = json.loads(json.dumps(running.get_state()))
    told = f"{says}.*set it back, or start in a new workdir"
    with (
        closing(batches(**{"streams": 2} | changes)) as resumed,
        pytest.raises(ConfigError, match=told),
    ):
        resumed.set_state(state)


def test_state_that_does_not_say_of_what_it_is_is_refused():
    with closing(batches()) as resumed, pytest.raises(ConfigError, match="does not say of which"):
        resumed.set_state({"0": {"rows": 3, "waiting": [], "mixture": {}}})


def test_document_that_waits_and_has_changed_is_refused():
    """As many rows of the same sizes, but other tokens."""
    with closing(batches()) as running:
        next(running)
        state = running.get_state()
    others = [e._replace(ids=e.ids + 1) for e in some()]
    with closing(batches(examples=others)) as resumed:
        resumed.set_state(state)
        with pytest.raises(ConfigError, match=r"'text' has changed since .* document \d+ is anoth"):
            next(resumed)


def rows_of(sizes, length, **options):
    held = Held(documents(sizes))
    pool = Pool("a", ordered(held, lambda example: example, 0, 0, 1), 1.0, 1.0)
    return iter(PackedRows(Mixture([pool], 0.0), length, 1000, **options))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 20))
def test_every_document_comes_once_an_epoch_in_pieces_that_join(sizes, length):
    """What was drawn is what came out and what waits: nothing is lost, nothing comes twice."""
    rows, came = rows_of(sizes, length), Counter()
    for _ in range(30):
        row = next(rows)
        came.update(row["tokens"][row["segment_ids"] > 0].tolist())
    state = rows.get_state()
    whole = documents(sizes)
    order = ordered(Held(whole), lambda example: example, 0, 0, 1)
    for _, number, start, stop, *_ in state["waiting"]:
        came.update(order[number].ids[start:stop].tolist())
    drawn = state["mixture"]["next"]["a"]
    assert came == Counter(t for n in range(drawn) for t in order[n].ids.tolist())
    full, rest = divmod(drawn, len(sizes))
    assert set(came.values()) <= {full, full + 1} if rest else {full}


LOG_NORMAL = [(512, 100, 1.0), (2048, 300, 1.0), (2048, 600, 1.2), (8192, 1000, 1.5)]


@pytest.mark.parametrize(("length", "median", "sigma"), LOG_NORMAL)
def test_log_normal_lengths_fill_98_percent(length, median, sigma):
    rng = np.random.default_rng(1)
    sizes = np.clip(rng.lognormal(np.log(median), sigma, 1500), 2, 1 << 16).astype(int)
    rows = rows_of(sizes.tolist(), length)
    fill = np.mean([next(rows)["segment_ids"] > 0 for _ in range(100)])
    print(f"rows of {length}, documents of {median} tokens (sigma {sigma}): {fill:.2%} filled")
    assert fill >= 0.98


def test_no_document_waits_for_long():
    """Even those that fit no row but one that they start."""
    rows = rows_of([15, 1, 1, 1, 9, 9], LENGTH)
    for _ in range(1000):
        next(rows)
        state = rows.get_state()
        oldest = min(piece[1] for piece in state["waiting"])
        assert state["mixture"]["next"]["a"] - oldest < 5000


def test_pieces_of_a_long_document_are_spread():
    rows = rows_of([LENGTH * 30] + [LENGTH] * 60, LENGTH)
    starts = [int(next(rows)["tokens"][0]) for _ in range(30)]
    assert 3 <= sum(start <= LENGTH * 30 for start in starts) <= 25


# Mixtures.


def pool(name, start, end=None, sizes=(5,), skipped=()):
    rows = [Example.answering([], [1] * n) for n in sizes] + list(skipped)
    order = ordered(Held(rows), lambda example: example, 0, 0, 1)
    return Pool(name, order, start, start if end is None else end)


def draw(mixture, count, total=None):
    return [mixture.draw(n / (total or count)) for n in range(count)]


def test_shares_of_tokens_are_the_weights_within_a_document():
    mixture = Mixture([pool("a", 3.0, sizes=(50,)), pool("b", 1.0, sizes=(2, 3))], 0.0)
    got = Counter()
    for name, _, example in draw(mixture, 2000):
        got[name] += len(example.ids)
        total = sum(got.values())
        assert abs(got["a"] - 0.75 * total) <= 50


def test_weights_go_linearly_from_a_stages_start_to_its_end():
    mixture = Mixture([pool("a", 1.0, 0.0), pool("b", 0.0, 1.0)], 0.0)
    names = [name for name, _, _ in draw(mixture, 1000)]
    tenths = [names[i : i + 100].count("b") for i in range(0, 1000, 100)]
    np.testing.assert_allclose(tenths, np.arange(5, 100, 10), atol=2)


def test_source_of_weight_zero_rests():
    mixture = Mixture([pool("a", 1.0), pool("b", 0.0)], 0.0)
    assert {name for name, _, _ in draw(mixture, 50)} == {"a"}


def test_skipped_rows_are_counted_and_too_many_stop(capsys):
    bad = [Skipped("malformed", f"line {n} is no JSON") for n in range(7)]
    mixture = Mixture([pool("a", 1.0, sizes=[1] * 93, skipped=bad)], 0.07)
    draw(mixture, 93)
    assert mixture.counts["a/malformed"] == 7
    told = capsys.readouterr().err
    assert told.count("is no JSON") == 5
    assert "more of this source are only counted" in told
    strict = Mixture([pool("a", 1.0, sizes=[1] * 93, skipped=bad)], 0.06)
    with pytest.raises(
        ConfigError, match=r"'a': 7 of .* malformed, data.bad_share is 0.06; .*JSON"
    ):
        draw(strict, 93)


def test_source_without_a_usable_row():
    with pytest.raises(ConfigError, match=r"'a' has no usable document: nothing"):
        Mixture([pool("a", 1.0, sizes=(), skipped=[Skipped("empty", "nothing")])], 0.0).draw(0)


def test_source_with_few_usable_rows():
    """However far apart two epochs' orders put them."""
    skipped = [Skipped("empty", "nothing")] * 20
    mixture = Mixture([pool("a", 1.0, sizes=(3,), skipped=skipped)], 0.0)
    assert len(draw(mixture, 200)) == 200


# Stages.


def staged(weights, *, length=LENGTH, names="ab", after=None, steps=20, batch=4):
    """Streams of a stage over sources of numbered documents."""
    all_sizes = {name: np.random.default_rng(ord(name)).integers(1, 30, 900) for name in "abc"}
    starts = {"a": 1, "b": 100_000, "c": 200_000}

    def make(stream):
        pools = []
        for name in names:
            held = Held(documents(all_sizes[name].tolist(), starts[name]))
            order = ordered(held, lambda example: example, 0, stream, 2)
            pools.append(Pool(name, order, weights[name], weights[name]))
        return PackedRows(Mixture(pools, 0.0), length, steps * batch // 2)

    stream = Streams(make, 2, batch, np.arange(batch))
    if after is not None:
        stream.go_on(after)
    return stream


def test_chats_too_long_for_the_next_stage_are_dropped_and_counted(tmp_path):
    """And come neither in pieces nor as a change of the data; those that fit wait on."""
    rng = np.random.default_rng(0)
    rows = [
        [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a" * size}]
        for n, size in enumerate(rng.integers(1, 120, 300).tolist())
    ]
    source = SourceConfig("c", (str(write_jsonl(tmp_path, [{"messages": r} for r in rows])),))
    source = dataclasses.replace(source, kind="chat")
    tokenizer = train_tokenizer(["some text"], 300)

    def stage(length, after=None):
        data = DataConfig(mixture=(source,), sequence_length=length, batch_size=2)
        return make_stream(JobConfig("sft", 9, data=data), tokenizer, steps=9, after=after)

    with closing(stage(256)) as long:
        next(long)
        state = json.loads(json.dumps(long.get_state()))
    sizes = [piece[3] for piece in state["0"]["waiting"]]
    with closing(stage(128, state)) as short:
        told = []
        for batch in itertools.islice(short, 5):
            told += [tokenizer.decode(tokens) for tokens, _, _ in segments(batch)]
        assert all(text.startswith(BOS) and text.endswith(EOS) for text in told)
        assert counts(short.get_state())["c/dropped"] == sum(size > 128 for size in sizes) > 20
        assert short.metrics()["data/dropped"] > 20


def test_examples_go_on_in_the_next_stage():
    data = DataConfig("recall", tasks=("associative_recall",), sequence_length=96, batch_size=2)

    def stage(length, after=None):
        job = JobConfig("sft", 3, data=dataclasses.replace(data, sequence_length=length))
        return make_stream(job, word_tokenizer(), steps=3, after=after)

    with closing(stage(96)) as first:
        whole = [tokens_of(batch) for batch in itertools.islice(first, 6)]
    with closing(stage(96)) as first:
        begun = [tokens_of(batch) for batch in itertools.islice(first, 3)]
        state = json.loads(json.dumps(first.get_state()))
    assert begun == whole[:3]
    with closing(stage(96, state)) as second:
        later = [tokens_of(batch) for batch in itertools.islice(second, 3)]
        assert not {*map(tuple, later)} & {*map(tuple, begun)}
        assert counts(second.get_state())["recall/dropped"] == 0
        assert second.get_state()["0"]["mixture"]["next"]["recall"] > 6
    with closing(stage(64, state)) as shorter:
        next(shorter)
        assert counts(shorter.get_state())["recall/dropped"] > 0


def tokens_of(batch):
    return batch["tokens"][batch["segment_ids"] > 0].tolist()


def test_stages_read_on_where_the_one_before_stopped():
    """Rows of another length, other batches, a source that rests for a stage: nothing comes twice
    before everything has come once.
    """
    plan = [
        {"weights": {"a": 2.0, "b": 1.0}},
        {"weights": {"a": 1.0, "c": 1.0}, "names": "ac", "length": 40, "batch": 2},
        {"weights": {"a": 1.0, "b": 1.0, "c": 1.0}, "names": "abc", "length": 9, "batch": 8},
    ]
    state, came = None, Counter()
    for stage in plan:
        stream = staged(after=state, **stage)
        for _ in range(5):
            came.update(tokens_of(next(stream)))
        state = json.loads(json.dumps(stream.get_state()))
        stream.close()
    drawn = {s: state[s]["mixture"]["counts"] for s in state}
    waiting = sum(p[3] - p[2] for s in state for p in state[s]["waiting"])
    total = sum(n for counts in drawn.values() for k, n in counts.items() if k.endswith("/tokens"))
    assert sum(came.values()) + waiting == total
    behind = {s: max(state[s]["mixture"]["next"].values()) for s in state}
    assert max(behind.values()) <= 450  # No stream is through with a source,
    assert max(came.values()) == 1  # so that no token can have come again.


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    before=st.integers(0, 4),
    first=st.sampled_from([1, 2, 4]),
    second=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 5),
)
@patch("train.data.packing._PIECES", 16)
def test_resume_on_another_number_of_processes_gives_the_same_rows(before, first, second, seed):
    """1, 2 or 4 processes read their rows of the batches; any of these numbers goes on from it."""

    def processes(count):
        rows = np.split(np.arange(8), count)
        data = DataConfig(sequence_length=LENGTH, batch_size=8, streams=4)
        job = JobConfig("sft", 100, seed=seed, data=data)
        return [example_stream(some(), job, rows=part) for part in rows], rows

    def read(parts, rows):
        whole = [next(part) for part in parts]
        return {
            name: np.concatenate([b[name][r] for b, r in zip(whole, rows, strict=True)])
            for name in whole[0]
        }

    straight, every = processes(1)
    expected = [read(straight, every) for _ in range(before + 3)]
    running, rows = processes(first)
    for batch in expected[:before]:
        same(read(running, rows), batch)
    state = {}
    for part in running:
        state |= part.get_state()
    resumed, rows = processes(second)
    for part in resumed:
        part.set_state(json.loads(json.dumps(state)))
    for batch in expected[before:]:
        same(read(resumed, rows), batch)
    assert {s for part in resumed for s in part.get_state()} == set(state)
    for part in [*straight, *running, *resumed]:
        part.close()


# Orders.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 2))
def test_block_shuffle_has_every_row_once_an_epoch(sizes, streams, epoch):
    class Blocks(Held):
        blocks = tuple(sizes)

    total = sum(sizes)
    if total < streams:
        return
    seen = []
    for stream in range(streams):
        order = ordered(Blocks(range(total)), lambda row: row, 0, stream, streams)
        assert isinstance(order._parent, BlockShuffle)
        seen += [order[epoch * len(order) + n] for n in range(len(order))]
    assert sorted(seen) == list(range(total))


def test_block_shuffle_reads_few_blocks_at_a_time_and_differs_by_epoch():
    class Blocks(Held):
        blocks = (100,) * 20

    order = ordered(Blocks(range(2000)), lambda row: row, 0, 0, 1)
    epochs = [[order[e * 2000 + n] for n in range(2000)] for e in range(2)]
    assert epochs[0] != epochs[1]
    for n in range(0, 2000, 400):
        assert len({row // 100 for row in epochs[0][n : n + 400]}) == 4


def test_blocks_are_cut_at_a_streams_border():
    np.testing.assert_array_equal(_cut([4, 4, 4], 2, 9), [2, 4, 1])


def test_more_streams_than_documents():
    with pytest.raises(ConfigError, match=r"data.streams is 8, but a source has only 3 documents"):
        batches(examples=documents([1, 2, 3]), streams=8, batch_size=8)
