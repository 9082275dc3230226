"""Generation against full forward passes without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import SamplingParams, generate
from mmjax.engine.generate import PromptError, pad_prompts
from mmjax.engine.sampling import sample
from tests.mmjax.programs import forward, with_config
from tests.train.programs import tiny_model

NEW = 8
GREEDY = SamplingParams(NEW, temperature=0.0)
SAMPLED = SamplingParams(NEW, temperature=0.7)
PROMPTS = [[5, 9, 2, 31, 7], [40], [3, 3, 18], [11, 25]]
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=48)


def complete(model, prompts, params, **options):
    return jax.device_get(generate(model, *pad_prompts(prompts, 5), params, KEY, **options))


@pytest.fixture(scope="module")
def sampled(model):
    return complete(model, PROMPTS, SAMPLED)


def full_logits(model, rows):
    """Logits of whole sequences, by one pass over rows padded to one width."""
    tokens, lengths = pad_prompts(rows, 5 + NEW)
    real = np.arange(tokens.shape[1])[None] < lengths[:, None]
    return np.asarray(forward(model, jnp.asarray(tokens), jnp.asarray(real, jnp.int32)).logits)


def named_logprobs(model, prompts, done, temperature=1.0):
    """log-softmax of each completion's tokens by a full pass [B, NEW]."""
    rows = [p + list(map(int, t)) for p, t in zip(prompts, done.tokens, strict=True)]
    logp = jax.nn.log_softmax(full_logits(model, rows) / temperature)
    out = np.zeros(done.tokens.shape)
    for row, prompt in enumerate(prompts):
        before = len(prompt) - 1 + np.arange(NEW)
        out[row] = logp[row, before, done.tokens[row]]
    return out


def test_greedy_is_the_argmax_of_full_passes(model):
    rows = [list(p) for p in PROMPTS]
    for _ in range(NEW):
        logits = full_logits(model, rows)
        rows = [[*row, int(logits[i, len(row) - 1].argmax())] for i, row in enumerate(rows)]
    done = complete(model, PROMPTS, GREEDY)
    for prompt, row, tokens in zip(PROMPTS, rows, done.tokens, strict=True):
        assert tokens.tolist() == row[len(prompt) :]
    np.testing.assert_allclose(done.logprobs, named_logprobs(model, PROMPTS, done), atol=1e-4)


def test_recorded_logprobs_are_those_of_a_full_pass(model, sampled):
    expected = named_logprobs(model, PROMPTS, sampled, temperature=0.7)
    assert np.abs(sampled.logprobs - expected).max() <= 1e-4
    # At another temperature they are not: the test above has teeth.
    assert np.abs(sampled.logprobs - named_logprobs(model, PROMPTS, sampled)).max() > 0.1


def test_rows_do_not_depend_on_the_others(model, sampled):
    others = [PROMPTS[0], [1, 2, 3, 4, 5], PROMPTS[2], [47]]
    done = complete(model, others, SAMPLED)
    for row in (0, 2):
        np.testing.assert_array_equal(done.tokens[row], sampled.tokens[row])
        np.testing.assert_allclose(done.logprobs[row], sampled.logprobs[row], atol=1e-5)


def test_rows_of_one_prompt_draw_apart(model):
    done = complete(model, [PROMPTS[0]] * 4, SAMPLED)
    assert len({tuple(row) for row in done.tokens.tolist()}) == 4


def test_samples_share_their_prompt(model):
    """Two prompts twice are four rows, those of one prompt side by side."""
    shared = complete(model, PROMPTS[:2], SAMPLED, samples=2)
    apart = complete(model, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], SAMPLED)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    np.testing.assert_allclose(shared.logprobs, apart.logprobs, atol=1e-5)


def test_without_an_end_token_every_row_runs_to_the_limit(sampled):
    np.testing.assert_array_equal(sampled.length, NEW)
    assert not sampled.finished.any()


def test_end_token_stops_its_row_alone(model, sampled):
    """The end token is one that a row drew in its middle."""
    drawn = sampled.tokens.tolist()
    eos, row = next((t, r) for r in range(4) for t in drawn[r][2:5] if drawn[r].index(t) > 1)
    done = complete(model, PROMPTS, SamplingParams(NEW, temperature=0.7, eos_id=eos))
    for r, tokens in enumerate(drawn):
        length = tokens.index(eos) + 1 if eos in tokens else NEW
        assert done.length[r] == length
        assert done.finished[r] == (eos in tokens)
        assert done.tokens[r].tolist() == tokens[:length] + [0] * (NEW - length)
        np.testing.assert_allclose(
            done.logprobs[r, :length], sampled.logprobs[r, :length], atol=1e-5
        )
        np.testing.assert_array_equal(done.logprobs[r, length:], 0)
    assert 2 <= done.length[row] < NEW


# The choice of one token.

LOGITS = jnp.asarray(np.random.default_rng(0).standard_normal((64, 48)) * 3, jnp.float32)


def draw(**params):
    keys = jax.random.split(jax.random.key(1), LOGITS.shape[0])
    return jax.device_get(sample(LOGITS, keys, SamplingParams(1, **params)))


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}]
)
def test_settings_that_leave_only_the_likeliest(params):
    tokens, _ = draw(**params)
    np.testing.assert_array_equal(tokens, LOGITS.argmax(-1))


def test_plain_sampling_is_not_greedy():
    assert (draw()[0] != LOGITS.argmax(-1)).any()


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.5}, {}])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_of_the_distribution_before_filters(params, temperature):
    tokens, logprobs = draw(temperature=temperature, **params)
    expected = jax.nn.log_softmax(LOGITS / temperature)[np.arange(64), tokens]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6)


def test_greedy_logprobs_are_at_temperature_one():
    tokens, logprobs = draw(temperature=0.0)
    expected = jax.nn.log_softmax(LOGITS)[np.arange(64), tokens]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6)


def test_top_k_keeps_k():
    tokens, _ = draw(top_k=3, temperature=10.0)
    rank = (LOGITS[np.arange(64), tokens][:, None] < LOGITS).sum(-1)
    assert set(rank.tolist()) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probability = jnp.array([0.4, 0.3, 0.2, 0.1])
    logits = jnp.tile(jnp.log(probability)[None], (200, 1))
    keys = jax.random.split(jax.random.key(2), 200)
    for top_p, kept in ((0.35, {0}), (0.45, {0, 1}), (0.75, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        tokens, _ = sample(logits, keys, SamplingParams(1, top_p=top_p))
        assert set(tokens.tolist()) == kept


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}],
)
def test_sampling_parameters_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must .*got"):
        SamplingParams(**wrong)


# Prompts that cannot be run.


def test_prompt_longer_than_its_place():
    with pytest.raises(PromptError, match="prompt 1 has 3 tokens; it must have 1 to 2"):
        pad_prompts([[1], [1, 2, 3]], 2)


def test_empty_prompt():
    with pytest.raises(PromptError, match="prompt 1 has 0 tokens"):
        pad_prompts([[1], []])


def test_no_prompts():
    with pytest.raises(PromptError, match="no prompts"):
        pad_prompts([])


def test_prompt_and_completion_beyond_the_models_positions(model):
    short = with_config(model, max_position_embeddings=12)
    with pytest.raises(PromptError, match=r"5 tokens and max_tokens=8 make 13.*12 positions"):
        complete(short, PROMPTS, GREEDY)
