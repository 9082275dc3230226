"""Token log-probabilities in chunks, and cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.mmjax.programs import random_model, small_config
from train import losses
from train.losses import cross_entropy, token_logprobs


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(num_layers=2, layer_types=("lightning", "softmax")))


@pytest.mark.parametrize("positions", [1, 4, 7])
def test_token_logprobs_in_chunks(model, monkeypatch, positions):
    """14 positions in chunks that divide them and that do not; values and gradients."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 7, model.cfg.hidden_size)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, model.cfg.vocab_size, (2, 7)), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((2, 7)), jnp.float32)

    structure, params = nnx.split(model)

    def run():
        def loss(hidden, params):
            logp = token_logprobs(nnx.merge(structure, params), hidden, targets, temperature=0.8)
            return jnp.sum(logp * weights), logp

        (by_hidden, by_params), logp = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, params)
        return (by_hidden, by_params["head"]["kernel"][...]), logp

    whole_grads, whole = run()
    monkeypatch.setattr(losses, "_POSITIONS", positions)
    monkeypatch.setattr(losses, "_LOGITS", 0)
    grads, chunked = run()
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    for actual, expected in zip(grads, whole_grads, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6 * float(jnp.abs(expected).max()))
    logp = jax.nn.log_softmax(model.logits(hidden) / 0.8)
    named = jnp.take_along_axis(logp, targets[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(whole, named, rtol=1e-5)


def test_cross_entropy_is_the_mean_over_the_mask():
    logprobs = jnp.array([[-1.0, -2.0], [-4.0, -8.0]])
    assert cross_entropy(logprobs, jnp.array([[1.0, 0.0], [1.0, 1.0]])) == (1 + 4 + 8) / 3
    assert cross_entropy(logprobs, jnp.zeros((2, 2))) == 0
