"""Token log-probabilities in chunks, and cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.layers.embed import exact_logits
from mmjax.model import Decoder
from tests.mmjax.programs import random_model, small_config
from tests.train.programs import adamw
from train import losses
from train.losses import cross_entropy, head_loss, token_logprobs
from train.state import init_state
from train.step import language_step


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


@pytest.mark.parametrize(("positions", "tied"), [(4, False), (7, False), (100, True)])
def test_head_loss_is_the_weighted_cross_entropy(model, monkeypatch, positions, tied):
    """And the z-loss; values, and gradients in the hidden states and the head, of all at once."""
    if tied:
        model = random_model(
            small_config(num_layers=1, layer_types=("softmax",), tie_embeddings=True)
        )
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 7, model.cfg.hidden_size)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, model.cfg.vocab_size, (2, 7)), jnp.int32)
    weights = jnp.asarray(rng.random((2, 7)) * (rng.random((2, 7)) < 0.7), jnp.float32)
    monkeypatch.setattr(losses, "_POSITIONS", positions)
    monkeypatch.setattr(losses, "_LOGITS", 0)
    structure, params = nnx.split(model)

    def plain(hidden, params):
        logits = nnx.merge(structure, params).logits(hidden)
        lse = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        ce = jnp.sum(weights * (lse - chosen))
        return ce + jnp.sum(weights * 0.1 * lse**2), ce

    def chunked(hidden, params):
        return head_loss(nnx.merge(structure, params), hidden, targets, weights, 0.1)

    got, want = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, params)
        for f in (chunked, plain)
    )
    for actual, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(actual, expected, atol=2e-6 * max(scale, 1e-3))
    # Without a gradient it is the same.
    alone = jax.jit(chunked)(hidden, params)
    np.testing.assert_allclose(alone, want[0], rtol=1e-6)


def test_bfloat16_head_gives_float32_logits():
    """Products of bfloat16 are exact in float32: nothing is lost but in the sum's order."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 5, 64)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((64, 48)), jnp.bfloat16)
    logits = exact_logits(hidden, kernel)
    assert logits.dtype == jnp.float32
    exact = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(logits, exact, atol=64 * 2.0**-24 * np.abs(exact).max())


def shapes_in(jaxpr):
    """Of every value in a program, those inside its loops included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


def test_no_array_of_all_logits_is_ever_made():
    """In the whole step of a model with the released vocabulary, forward, backward and update."""
    cfg = small_config(num_layers=1, layer_types=("lightning",), vocab_size=200064)
    optimizer = adamw()
    graphs = []

    def make():
        model = Decoder(cfg, rngs=nnx.Rngs(0))
        graphs.append(nnx.graphdef(model))
        return init_state(model, optimizer, 0)[1]

    state = jax.eval_shape(make)
    rows, length = 4, 8192
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {"tokens": ids, "segment_ids": ids, "positions": ids}
    batch |= {"loss_mask": jax.ShapeDtypeStruct((rows, length), jnp.float32)}
    jaxpr = jax.make_jaxpr(lambda s, b: language_step(graphs[0], optimizer, s, b))(state, batch)
    most = max(np.prod(s, dtype=np.int64) for s in shapes_in(jaxpr.jaxpr) if 200064 in s)
    assert most == 2048 * 200064
    assert most < rows * length * 200064 / 15
