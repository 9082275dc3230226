"""Packed documents, padding and positions in the whole model, both kinds of layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.mmjax.programs import empty_cache, extend, forward, random_model, small_config, tokens


@pytest.fixture(scope="module", params=["lightning", "softmax"])
def model(request):
    return random_model(small_config(num_layers=2, layer_types=(request.param,) * 2))


LENGTHS = (5, 1, 9, 3)
# Padding before, between and after four documents; their ids need not rise.
IDS = np.array([[0] * 2 + [3] * 5 + [7] * 1 + [0] * 2 + [1] * 9 + [2] * 3 + [0] * 2], np.int32)


def assert_near(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5 * float(np.abs(expected).max()))


def documents(model):
    """The tokens of each document, alone."""
    return [tokens(model.cfg, 1, length, seed=length) for length in LENGTHS]


def packed(model, fill=0):
    row = np.full(IDS.shape, fill, np.int32)
    row[IDS != 0] = np.concatenate([d[0] for d in documents(model)])
    return jnp.asarray(row)


def alone(model):
    """Logits of each document in a call of its own, padded to one length to share the program."""
    out = []
    for document in documents(model):
        length = document.shape[1]
        row = jnp.pad(document, ((0, 0), (0, IDS.size - length)))
        real = jnp.arange(IDS.size, dtype=jnp.int32)[None] < length
        out.append(forward(model, row, real.astype(jnp.int32)).logits[0, :length])
    return np.concatenate(out)


def test_documents_do_not_see_each_other(model):
    together = forward(model, packed(model), jnp.asarray(IDS))
    assert_near(together.logits[IDS != 0], alone(model))


def test_padding_tokens_are_not_read(model):
    first = forward(model, packed(model), jnp.asarray(IDS))
    other = forward(model, packed(model, fill=11), jnp.asarray(IDS))
    np.testing.assert_array_equal(first.logits[IDS != 0], other.logits[IDS != 0])
    np.testing.assert_array_equal(first.aux.tokens_per_expert, other.aux.tokens_per_expert)
    assert first.aux.tokens_per_expert.sum() == 2 * 2 * sum(LENGTHS)  # layers, experts a token


def test_without_segments_they_do(model):
    """The test above could not pass by chance."""
    together = forward(model, packed(model), jnp.asarray((IDS != 0).astype(np.int32)))
    assert np.abs(together.logits[IDS != 0] - alone(model)).max() > 0.1


def test_given_positions_are_used():
    model = random_model(small_config(num_layers=2, layer_types=("softmax",) * 2))
    row, ids = packed(model), jnp.asarray(IDS)
    place = np.concatenate([np.arange(n, dtype=np.int32) for n in LENGTHS])
    positions = np.zeros(IDS.shape, np.int32)
    positions[IDS != 0] = place
    default = forward(model, row, ids).logits[IDS != 0]
    same = forward(model, row, ids, jnp.asarray(positions)).logits[IDS != 0]
    np.testing.assert_array_equal(same, default)
    # RoPE is relative: a common shift changes nothing, another spacing does.
    shifted = forward(model, row, ids, jnp.asarray(positions + 100)).logits[IDS != 0]
    assert_near(shifted, default)
    spread = forward(model, row, ids, jnp.asarray(positions * 3)).logits[IDS != 0]
    assert np.abs(spread - default).max() > 1e-2


def test_padding_inside_a_chunk_with_a_cache(model):
    """Rows of several lengths, padded left and right and between, in two chunks."""
    ids = tokens(model.cfg, 3, 9)
    whole = forward(model, ids).logits
    masks = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1]], np.int32)
    second = np.array([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1]], np.int32)
    cache, done = empty_cache(model, 3, 9), np.zeros(3, int)
    for mask in (masks, second):
        chunk = np.zeros(mask.shape, np.int32)
        for row, real in enumerate(mask.astype(bool)):
            chunk[row, real] = ids[row, done[row] : done[row] + real.sum()]
        logits, cache = extend(model, jnp.asarray(chunk), cache, jnp.asarray(mask))
        for row, real in enumerate(mask.astype(bool)):
            expected = whole[row, done[row] : done[row] + real.sum()]
            assert_near(logits[row][real], np.asarray(expected))
        done += mask.sum(1)
    np.testing.assert_array_equal(cache.length, done)


def test_a_row_without_tokens(model):
    ids = jnp.zeros((2, 4), jnp.int32)
    segments = jnp.array([[0, 0, 0, 0], [1, 1, 1, 1]], jnp.int32)
    logits, cache = extend(model, ids, empty_cache(model, 2, 8), segments)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(cache.length, [0, 4])
    np.testing.assert_array_equal(cache.state[:, 0], 0)


def test_lengths_stand_for_padding_on_the_right(model):
    lengths = jnp.array([20, 7, 1], jnp.int32)
    real = np.arange(20)[None] < np.asarray(lengths)[:, None]
    rows = tokens(model.cfg, 3, 20)
    expected = forward(model, rows, jnp.asarray(real, jnp.int32))
    found = model(rows, lengths=lengths)
    assert_near(found.logits[real], expected.logits[real])
    for mine, other in zip(found.aux, expected.aux, strict=True):
        assert_near(mine, other)
    with pytest.raises(ValueError, match="lengths are for rows without"):
        model(rows, lengths=lengths, cache=empty_cache(model, 3, 20))
