"""Text as it comes: whole characters, stop strings, thinking that is closed."""

import dataclasses

import numpy as np
import pytest

from mmjax import SamplingParams
from mmjax.chat import ReplyParser
from mmjax.engine.sample import CLOSING, NO_THINKING
from mmjax.engine.text import TextStream
from tests.mmjax.engines import byte_tokenizer, prompt, small_engine

TOKENIZER = byte_tokenizer()
TEXT = "naïve – 日本語, 🙂👩‍👩‍👧 and plain words; stop here END more"


def pieces(ids, sizes, stop=()):
    """Texts that come of tokens pushed in portions, until a stop string."""
    stream, found, start = TextStream(TOKENIZER, stop), [], 0
    for size in sizes:
        text, stopped = stream.push(ids[start : start + size])
        found.append(text)
        if stopped is not None:
            return found, start + stopped
        start += size
    return [*found, stream.finish()], None


def portions(rng, total):
    while total > 0:
        size = int(min(rng.integers(1, 6), total))
        total -= size
        yield size


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_whole_characters(seed):
    ids = TOKENIZER.encode(TEXT)
    found, _ = pieces(ids, portions(np.random.default_rng(seed), len(ids)))
    assert "".join(found) == TEXT
    assert "\ufffd" not in "".join(found)


@pytest.mark.parametrize("seed", range(5))
def test_bytes_that_are_no_text(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, 200).tolist()
    found, _ = pieces(ids, portions(rng, len(ids)))
    assert "".join(found) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), TEXT[: TEXT.index("END")]),
        (("ENDING", "here EN"), TEXT[: TEXT.index("here EN")]),
        (("語, 🙂",), TEXT[: TEXT.index("語")]),
        (("n", "naï"), ""),
        (("more!",), TEXT),
    ],
)
def test_stop_strings_never_leak(seed, stop, expected):
    ids = TOKENIZER.encode(TEXT)
    found, count = pieces(ids, portions(np.random.default_rng(seed), len(ids)), stop)
    assert "".join(found) == expected
    if expected != TEXT:
        ended = TOKENIZER.decode(ids[:count])
        assert any(ended.endswith(s) for s in stop)


# With a model.


@pytest.fixture(scope="module")
def engine():
    return small_engine()


def test_streamed_text_is_the_text(engine):
    params = SamplingParams(max_tokens=60, seed=3, n=2)
    outputs = list(engine.stream("hello", params))
    whole = engine.generate(["hello"], params)
    assert len(outputs) > 4
    for completion in whole:
        mine = [out for out in outputs if out.index == completion.index]
        assert "".join(out.text for out in mine) == completion.text
        assert [t for out in mine for t in out.token_ids] == completion.token_ids
        assert [out.finish_reason for out in mine[:-1]] == [None] * (len(mine) - 1)
        shown = [t for t in completion.token_ids if t != TOKENIZER.eos_id]
        assert completion.text == TOKENIZER.decode(shown)
        assert completion.prompt_tokens == 5


def test_leaving_a_stream_frees_its_slot(engine):
    for _ in engine.stream("hello", SamplingParams(max_tokens=60)):
        break
    assert not engine.has_work
    assert engine.stats().running == 0


def test_outputs_of_others_wait_for_their_reader(engine):
    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    name = engine.add("hello", params)
    (other,) = engine.generate(["other"], params)
    outputs = [*engine.step()]
    while engine.has_work:
        outputs += engine.step()
    assert {out.request_id for out in outputs} == {name}
    assert "".join(out.text for out in outputs) == engine.generate(["hello"], params)[0].text
    assert len(other.token_ids) == 20


def test_stop_string_ends_a_sample(engine):
    (free,) = engine.generate([prompt(9)], SamplingParams(max_tokens=40, temperature=0.0))
    stop = free.text[5:8]
    params = SamplingParams(max_tokens=40, temperature=0.0, stop=(stop,), logprobs=0)
    (done,) = engine.generate([prompt(9)], params)
    assert done.finish_reason == "stop"
    assert done.text == free.text[: free.text.index(stop)]
    assert done.token_ids == free.token_ids[: len(done.token_ids)]
    assert stop in TOKENIZER.decode(done.token_ids)
    assert len(done.logprobs) == len(done.token_ids) < 40


def test_end_token_is_no_text(engine):
    """An end token that is sure to come: at temperature 0 the first one, named as one."""
    (free,) = engine.generate([prompt(9)], SamplingParams(max_tokens=8, temperature=0.0))
    params = SamplingParams(max_tokens=8, temperature=0.0, stop_ids=(free.token_ids[0],))
    (done,) = engine.generate([prompt(9)], params)
    assert (done.text, done.token_ids, done.finish_reason) == ("", free.token_ids[:1], "stop")


@pytest.mark.parametrize("budget", [0, 1, 21])
def test_thinking_is_closed_at_its_budget(engine, budget):
    thinking = prompt(9) + TOKENIZER.encode("<think>\n")
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    (free,) = engine.generate([thinking], params)
    closing = TOKENIZER.encode(CLOSING)
    params = SamplingParams(
        max_tokens=60, temperature=0.0, ignore_eos=True, thinking_budget=budget, logprobs=0
    )
    (done,) = engine.generate([thinking], params)
    assert done.token_ids[:budget] == free.token_ids[:budget]
    assert done.token_ids[budget : budget + len(closing)] == closing
    assert len(done.token_ids) == len(done.logprobs) == 60
    # What follows is drawn with the closed thinking before it.
    so_far = thinking + done.token_ids[: budget + len(closing)]
    params = SamplingParams(max_tokens=60 - budget - len(closing), temperature=0.0, ignore_eos=True)
    (answer,) = engine.generate([so_far], params)
    assert answer.token_ids == done.token_ids[budget + len(closing) :]


@pytest.mark.parametrize("before", ["", "<think>\nIt is 4.\n</think>\n\n"])
def test_a_budget_closes_no_thinking_that_is_not_open(engine, before):
    """Without a token to think the part that is left out is written, empty."""
    asked = prompt(9) + TOKENIZER.encode(before)
    free = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    expected = engine.generate([asked], free)[0].token_ids
    for budget in (3, 21):
        params = dataclasses.replace(free, thinking_budget=budget)
        assert engine.generate([asked], params)[0].token_ids == expected
    (none,) = engine.generate([asked], dataclasses.replace(free, thinking_budget=0))
    assert none.text.startswith(NO_THINKING)
    pieces = [*(parser := ReplyParser(tools=False)).feed(none.text), *parser.finish()]
    assert {piece.kind for piece in pieces} == {"text"}


def test_thinking_that_closed_itself_goes_on(engine):
    closed = TOKENIZER.encode("</think>")
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, thinking_budget=20)
    sample_ids = iter(closed)
    original = engine._programs.decode
    try:
        engine._programs = engine._programs._replace(
            decode=lambda *args, **static: _forcing(original, sample_ids, *args, **static)
        )
        (done,) = engine.generate([prompt(9) + TOKENIZER.encode("<think>\n")], params)
    finally:
        engine._programs = engine._programs._replace(decode=original)
    assert done.token_ids[:8] == closed
    assert TOKENIZER.encode(CLOSING)[1:9] == closed
    assert "</think>" not in TOKENIZER.decode(done.token_ids[8:])


def _forcing(decode, ids, leaves, pools, packed, *rest, **static):
    """A decode call that gives the first row these tokens instead of drawn ones."""
    from mmjax.engine.programs import FORCED, ROW_WORDS, STOPS

    given = list(ids)
    if given:
        packed = packed.copy()
        packed[0, ROW_WORDS - FORCED - STOPS - 1] = len(given)
        packed[0, ROW_WORDS - FORCED : ROW_WORDS - FORCED + len(given)] = given
    return decode(leaves, pools, packed, *rest, **static)


def test_bytes_that_are_no_character_are_shown_as_they_come():
    """Three of them may be a character's beginning; time does not grow with the text."""
    bad = next(i for i in range(256) if TOKENIZER.token_bytes(i) == b"\x80")
    for stop in ((), ("stop",)):
        stream, shown = TextStream(TOKENIZER, stop), ""
        for _ in range(40):
            shown += stream.push([bad] * 16)[0]
            assert len(stream._window) <= 64 + 16
        assert len(shown) >= 640 - 3
        assert shown + stream.finish() == "\ufffd" * 640
    stream = TextStream(TOKENIZER)
    assert stream.push([bad] * 100 + TOKENIZER.encode("é")[:1])[0] == "\ufffd" * 98
    assert stream.push(TOKENIZER.encode("é")[1:])[0] == "\ufffd\ufffdé"
