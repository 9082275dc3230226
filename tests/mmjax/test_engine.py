"""The engine: whatever runs beside a request, it gets what it gets alone."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import monitoring

from kernels_pallas import dispatch
from mmjax import Engine, RequestError, SamplingParams
from mmjax.engine import RepetitionHalt
from mmjax.engine.programs import decode_programs
from mmjax.engine.sampling import Wanted
from tests.mmjax.engines import CFG, ONE_LAYER, SIZES, SMALL, prompt, small_engine, small_model
from tests.mmjax.programs import forward, random_model, small_config

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def engine():
    return small_engine()


def alone(engine, model, ids, params):
    """A request in an idle engine that keeps no prefix."""
    engine.update(model)
    return engine.generate([ids], params)


def told(completion):
    """What must not depend on others."""
    return completion.token_ids, completion.logprobs, completion.finish_reason


def finish(engine, outputs=()):
    """Steps until idle; tokens, logprobs and reason of each sample."""
    samples = {}
    outputs = list(outputs)
    while engine.has_work:
        outputs += engine.step()
    for out in outputs:
        ids, logprobs, _ = samples.get((out.request_id, out.index), ([], [], None))
        joined = (ids + out.token_ids, logprobs + (out.logprobs or []), out.finish_reason)
        samples[out.request_id, out.index] = joined
    return samples


def assert_all_free(engine):
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.swapped) == (0, 0, 0)
    assert stats.pages_used == stats.pages_cached


@contextlib.contextmanager
def counting_compilations():
    found = []

    def listen(name, *_, **__):
        if "backend_compile" in name:
            found.append(name)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(listen)


# Alone and among others.


def scenario(rng):
    """Requests, some with a common beginning, of all kinds of sampling."""
    shared = prompt(int(rng.integers(20, 60)), 99)
    requests = []
    for i in range(14):
        own = prompt(int(rng.choice([1, 2, 9, 16, 17, 31])), int(rng.integers(1000)))
        ids = shared[: int(rng.choice([16, 32, 60]))] * int(rng.random() < 0.4) + own
        params = SamplingParams(
            max_tokens=int(rng.integers(1, min(64, 128 - len(ids)) + 1)),
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_p=float(rng.choice([1.0, 0.8])),
            top_k=int(rng.choice([0, 5])),
            min_p=float(rng.choice([0.0, 0.05])),
            seed=i,
            n=int(rng.choice([1, 1, 3])),
            stop_ids=tuple(rng.integers(0, CFG.vocab_size, int(rng.choice([0, 0, 0, 2]))).tolist()),
            logprobs=int(rng.choice([0, 2])),
        )
        requests.append((ids, params))
    return requests


@pytest.mark.parametrize("seed", range(4))
def test_any_company_changes_nothing(engine, model, seed):
    """Random arrivals, lengths, cancellations, pages short and used again; to the bit."""
    rng = np.random.default_rng(seed)
    requests = scenario(rng)
    engine.update(model)
    before = engine.stats()
    outputs, waiting, cancelled = [], dict(enumerate(requests)), set()
    with counting_compilations() as compilations:
        while waiting or engine.has_work:
            for i in list(waiting)[: int(rng.integers(0, 4))]:
                engine.add(*waiting.pop(i), request_id=f"{seed}-{i}")
            outputs += engine.step()
            if rng.random() < 0.1:
                name = f"{seed}-{rng.integers(len(requests))}"
                if engine.cancel(name):
                    cancelled.add(name)
        samples = finish(engine, outputs)
    assert not compilations
    assert_all_free(engine)
    after = engine.stats()
    assert after.preemptions > before.preemptions
    assert after.cached_prompt_tokens > before.cached_prompt_tokens
    for i, (ids, params) in enumerate(requests):
        for expected in alone(engine, model, ids, params):
            got = samples[f"{seed}-{i}", expected.index]
            if got[2] == "cancelled":
                assert f"{seed}-{i}" in cancelled
                got = (*got[:2], expected.finish_reason)
                count = len(got[0])
                expected.token_ids = expected.token_ids[:count]
                expected.logprobs = (expected.logprobs or [])[:count]
            assert got == (expected.token_ids, expected.logprobs or [], expected.finish_reason)


def test_programs_for_less_give_the_same(monkeypatch):
    """As a GPU has them for few rows: greedy, by chance, and anything, all of them warm."""
    model = random_model(small_config(**ONE_LAYER))
    sizes = SIZES | {"max_slots": 1, "max_length": 16}
    kinds = [{"temperature": 0.0}, {}, {"top_k": 5}, {"logprobs": 2}, {"temperature": 0.0, "n": 2}]
    params = [SamplingParams(6, seed=3, ignore_eos=True, **kind) for kind in kinds]

    def run(engine):
        return [told(c) for p in params for c in engine.generate([prompt(5)], p)]

    want = run(Engine(model, **sizes))
    monkeypatch.setattr("mmjax.engine.engine.decode_programs", lambda _: tuple(Wanted))
    engine = Engine(model, **sizes)
    engine.warm_up()
    with counting_compilations() as compilations:
        got = run(engine)
    assert not compilations
    assert got == want


def test_on_a_gpu_without_kernels(monkeypatch):
    """Projections are fused there, and few rows have programs of their own; on its XLA forms."""
    model = random_model(small_config(**SMALL))
    params = [SamplingParams(6, temperature=0.0, seed=1), SamplingParams(6, seed=1)]
    sizes = SIZES | {"max_slots": 1, "max_length": 64}

    def run():
        engine = Engine(model, **sizes)
        names = {path[-1] for path, _ in nnx.to_flat_state(engine._unstack(nnx.state(model))[1])}
        return names, [c.token_ids for p in params for c in engine.generate([prompt(40)], p)]

    names, want = run()
    assert "qkv" in names
    gpu = dispatch.Target("gpu", "NVIDIA A100", 108)
    monkeypatch.setattr(dispatch, "target", lambda *_: gpu)
    names, got = run()
    assert "fused" in names
    assert not names & {"qkv", "q", "k", "v"}
    assert got == want
    assert decode_programs(16) == tuple(Wanted)
    assert decode_programs(17) == (Wanted.ANYTHING,)


def full_logprobs(model, ids, temperature=1.0):
    """log-softmax of every position by one pass without a cache."""
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(ids)] = ids
    real = (np.arange(128) < len(ids))[None].astype(np.int32)
    logits = forward(model, jnp.asarray(tokens), jnp.asarray(real)).logits[0]
    return np.asarray(jax.nn.log_softmax(logits / (temperature or 1.0)))


@pytest.mark.parametrize(
    ("length", "temperature"), [(1, 0.0), (7, 0.0), (33, 0.7), (64, 1.0), (80, 0.0)]
)
def test_tokens_are_those_of_full_passes(engine, model, length, temperature):
    params = SamplingParams(12, temperature, seed=5, logprobs=1, ignore_eos=True)
    ids = prompt(length, length)
    (done,) = engine.generate([ids], params)
    logp = full_logprobs(model, ids + done.token_ids, temperature)
    for place, (token, own) in enumerate(
        zip(done.token_ids, done.logprobs, strict=True), length - 1
    ):
        best = int(logp[place].argmax())
        assert own.token == token
        assert own.logprob == pytest.approx(logp[place, token], abs=2e-5)
        assert own.top[0] == (best, pytest.approx(logp[place, best], abs=2e-5))
        assert temperature or token == best
    assert (done.prompt_tokens, done.finish_reason) == (length, "length")


# Prefixes.


def test_samples_of_a_prompt_share_its_prefill(engine, model):
    ids = prompt(40)
    engine.update(model)
    before = engine.stats()
    done = engine.generate([ids], SamplingParams(max_tokens=5, seed=1, n=9, logprobs=0))
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == 9 * 40
    assert after.cached_prompt_tokens - before.cached_prompt_tokens == 8 * 39
    assert [c.cached_tokens for c in done] == [0] + [39] * 8
    assert [c.index for c in done] == list(range(9))
    assert len({tuple(c.token_ids) for c in done}) > 5


def test_requests_that_begin_alike_share_up_to_a_border(engine, model):
    engine.update(model)
    first, second = [*prompt(70), 1, 2], [*prompt(70), 3, 4, 5]
    done = engine.generate([first, second], GREEDY)
    # Cut at 16 and 32, then at multiples of 32.
    assert [c.cached_tokens for c in done] == [0, 64]
    for completion, ids in zip(done, (first, second), strict=True):
        assert told(completion) == told(alone(engine, model, ids, GREEDY)[0])


def test_prefixes_give_way_to_running_samples(engine, model):
    engine.update(model)
    engine.generate([prompt(72)], GREEDY)
    before = engine.stats()
    assert before.pages_cached == 9
    (done,) = engine.generate([prompt(80, 1)], GREEDY)
    assert done.finish_reason == "length"
    assert engine.stats().preemptions == before.preemptions
    assert_all_free(engine)


def test_short_prompts_are_computed_in_one_call(engine, model, monkeypatch):
    """Two chunks of 16 tokens are as many as a round takes; to the bit what each gets alone."""
    run, together = engine._run_chunks, []

    def counted(chunks, *args):
        together.append(len(chunks))
        run(chunks, *args)

    monkeypatch.setattr(engine, "_run_chunks", counted)
    engine.update(model)
    prompts = [prompt(9, seed) for seed in range(4)]
    done = engine.generate(prompts, GREEDY)
    assert together == [2, 2]
    for completion, ids in zip(done, prompts, strict=True):
        assert told(completion) == told(alone(engine, model, ids, GREEDY)[0])
    assert together[2:] == [1] * 4


# How a sample ends.


def test_stop_id_ends_its_sample_alone(engine):
    params = SamplingParams(max_tokens=12, temperature=0.0)
    first, other = engine.generate([prompt(9), prompt(5, 1)], params)
    stop = first.token_ids[4]
    # More of them than the device is told.
    never = tuple(t for t in range(256) if t not in first.token_ids + other.token_ids)[:12]
    for stops in ((stop,), (*never, stop)):
        params = SamplingParams(max_tokens=12, temperature=0.0, stop_ids=stops)
        cut, whole = engine.generate([prompt(9), prompt(5, 1)], params)
        assert cut.token_ids == first.token_ids[: first.token_ids.index(stop) + 1]
        assert cut.finish_reason == "stop"
        if stop not in other.token_ids:
            assert whole.token_ids == other.token_ids


def test_end_token_of_the_model_and_ignoring_it(engine, model, monkeypatch):
    (free,) = engine.generate([prompt(9)], GREEDY)
    eos = free.token_ids[3]
    ending = Engine(model, **SIZES)
    monkeypatch.setattr(ending, "cfg", dataclasses.replace(CFG, eos_token_id=eos))
    (done,) = ending.generate([prompt(9)], SamplingParams(max_tokens=12, temperature=0.0))
    assert (done.token_ids[-1], done.finish_reason) == (eos, "stop")
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    assert ending.generate([prompt(9)], params)[0].token_ids == free.token_ids


def test_repetition_halts(engine):
    """Every token is likelier than a millionth, so the fifth one is the last."""
    halt = RepetitionHalt(tokens=5, probability=1e-6)
    params = SamplingParams(max_tokens=40, seed=1, ignore_eos=True, repetition_halt=halt)
    (done,) = engine.generate([prompt(9)], params)
    assert (len(done.token_ids), done.finish_reason) == (5, "repetition")


def test_likely_tokens_are_counted_over_bursts(engine):
    (free,) = engine.generate(
        [prompt(9)], SamplingParams(max_tokens=60, temperature=0.0, logprobs=0)
    )
    sure = np.exp([t.logprob for t in free.logprobs])
    bar = float(np.median(sure))
    runs = np.zeros(61, int)
    for i, likely in enumerate(sure > bar):
        runs[i] = runs[i - 1] + 1 if likely else 0
    longest = int(runs.max())
    halt = RepetitionHalt(tokens=longest, probability=bar)
    params = SamplingParams(max_tokens=60, temperature=0.0, repetition_halt=halt)
    (done,) = engine.generate([prompt(9)], params)
    assert len(done.token_ids) == int(runs.argmax()) + 1


def test_cancelling(engine):
    params = SamplingParams(max_tokens=70, seed=1, n=6, ignore_eos=True)
    engine.add(prompt(20), params, request_id="gone")
    kept = engine.add(prompt(9), GREEDY)
    outputs = engine.step()
    assert engine.stats().running
    assert engine.cancel("gone")
    assert not engine.cancel("gone")
    assert not engine.cancel("never")
    samples = finish(engine, outputs)
    assert all(samples["gone", i][2] == "cancelled" for i in range(6))
    assert samples[kept, 0][2] == "length"
    assert_all_free(engine)


# Weights.


def test_new_weights_take_over_unfinished_samples(engine, model):
    """Tokens drawn before the update stay, and those after it are the new model's."""
    other = random_model(CFG, seed=1)
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    engine.update(model)
    name = engine.add(prompt(40), params)
    outputs = []
    while not outputs:
        outputs += engine.step()
    engine.update(other)
    drawn = [t for out in outputs for t in out.token_ids]
    ids, _, _ = finish(engine, outputs)[name, 0]
    assert 0 < len(drawn) < 40
    assert ids[: len(drawn)] == drawn
    logp = full_logprobs(other, prompt(40) + ids)
    assert ids[len(drawn) :] == logp[39 + len(drawn) : 79].argmax(-1).tolist()
    (fresh,) = engine.generate([prompt(40)], params)
    logp = full_logprobs(other, prompt(40) + fresh.token_ids)
    assert fresh.token_ids == logp[39:79].argmax(-1).tolist()
    engine.update(model)


# Requests that cannot be run.


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], {}, "not empty"),
        ([1, 258], {}, "token id 258 is not in the vocabulary of 258"),
        ([-1], {}, "token id -1"),
        (np.array([1.5]), {}, "list of token ids"),
        ([1] * 125, {"max_tokens": 7}, "125 tokens and max_tokens=7 exceed the engine's 128"),
        ([1], {"n": 5000}, "n must be at most"),
    ],
)
def test_bad_requests(engine, ids, params, message):
    with pytest.raises(RequestError, match=message):
        engine.add(ids, SamplingParams(**{"max_tokens": 4} | params))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("ids", "params"), [("text", {}), ([1], {"stop": ("x",)}), ([1], {"thinking_budget": 3})]
)
def test_what_needs_a_tokenizer(model, ids, params):
    mute = Engine(model, **SIZES)
    with pytest.raises(RequestError, match="needs a tokenizer, and the engine has none"):
        mute.add(ids, SamplingParams(4, **params))


def test_a_name_in_use(engine):
    """Also while its last output has not been given; a name that was not asked for is a new one."""
    engine.add([1], GREEDY, request_id="twice")
    for _ in range(2):
        with pytest.raises(RequestError, match="'twice' is still running"):
            engine.add([1], GREEDY, request_id="twice")
        engine.cancel("twice")
    finish(engine)
    engine.add([1], GREEDY, request_id=f"request-{engine._arrivals + 1}")
    engine.add([1], GREEDY)
    assert {reason for *_, reason in finish(engine).values()} == {"length"}


def test_streams_side_by_side_give_all(engine, model):
    """And a call of `generate` between two outputs of a stream; nothing is left of a failed one."""
    asked = [(prompt(10, 1), 40), (prompt(12, 2), 20), (prompt(7, 3), 30)]
    each = [dataclasses.replace(GREEDY, max_tokens=most) for _, most in asked]
    expected = [alone(engine, model, ids, p)[0] for (ids, _), p in zip(asked, each, strict=True)]
    first, second = (engine.stream(asked[i][0], each[i]) for i in range(2))
    got = [[next(first)], [next(second)]]
    (between,) = engine.generate([asked[2][0]], each[2])
    got[0] += first
    got[1] += second
    assert told(between) == told(expected[2])
    for outputs, one in zip(got, expected, strict=False):
        assert [t for o in outputs for t in o.token_ids] == one.token_ids
        assert outputs[-1].finish_reason == one.finish_reason
    with pytest.raises(RequestError):
        engine.generate([prompt(4), prompt(500)], GREEDY)
    assert not engine.has_work
    assert_all_free(engine)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_slots": 0}, "max_slots must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"num_pages": -1}, "num_pages must be at least 1, got -1"),
        ({"prefill_chunk": 48, "prefix_block": 16}, "prefill_chunk 48 must be a power of two"),
    ],
)
def test_bad_sizes(model, sizes, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, **sizes)


def test_weights_of_another_architecture_are_refused(engine, model):
    """And the engine goes on with those it has; other dtypes are cast."""
    expected = told(alone(engine, model, prompt(9), GREEDY)[0])
    for sizes in (ONE_LAYER, SMALL | {"hidden_size": 64}):
        with pytest.raises(ValueError, match=r"another architecture: \[.*the engine's"):
            engine.update(random_model(small_config(**sizes)))
        assert told(engine.generate([prompt(9)], GREEDY)[0]) == expected
    dtypes = [x.dtype for x in engine._leaves]
    engine.update(jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    assert [x.dtype for x in engine._leaves] == dtypes
    engine.update(model)


@pytest.mark.parametrize("ids", ["\ud800", np.array([1.5]), np.array([[1, 2]]), []])
def test_prompts_that_are_none(engine, ids):
    with pytest.raises(RequestError, match="the prompt"):
        engine.add(ids, GREEDY)
    assert not engine.has_work
