"""The language step on packed rows, against each document alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmjax.model import Decoder
from tests.mmjax.programs import forward, small_config
from tests.train.programs import adamw, assert_same, copied, tiny_model
from train.state import from_flat, init_state, to_flat
from train.step import language_step

# Two rows; documents of 5, 4 and 3 tokens, then 6 and a single one, which predicts nothing.
IDS = np.array([[1] * 5 + [2] * 4 + [3] * 3, [1] * 6 + [2] + [0] * 5], np.int32)
POSITIONS = np.array([[*range(5), *range(4), *range(3)], [*range(6), 0, *[0] * 5]], np.int32)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 48, IDS.shape).astype(np.int32) * (IDS > 0)
    mask = (rng.random(IDS.shape) < 0.7).astype(np.float32) * (IDS > 0)
    return {"tokens": tokens, "segment_ids": IDS, "positions": POSITIONS, "loss_mask": mask}


def document_losses(model, batch):
    """-log p of each token that is to be predicted, every document in a pass of its own."""
    losses = []
    for row, ids in enumerate(IDS):
        for segment in range(1, ids.max() + 1):
            tokens = batch["tokens"][row][ids == segment]
            wanted = batch["loss_mask"][row][ids == segment]
            padded = np.zeros((1, 6), np.int32)
            padded[0, : len(tokens)] = tokens
            real = np.arange(6)[None] < len(tokens)
            logits = forward(model, jnp.asarray(padded), jnp.asarray(real, jnp.int32)).logits[0]
            logp = np.asarray(jax.nn.log_softmax(logits))
            # The first token of a document has nothing before it that could predict it.
            losses += [-logp[t - 1, tokens[t]] for t in range(1, len(tokens)) if wanted[t]]
    return losses


@pytest.fixture(scope="module")
def stepped():
    """A batch, the state before it and after it, and the metrics."""
    optimizer = adamw(learning_rate=1e-3)
    model = tiny_model(48)
    model.remat = "none"
    graphdef, state = init_state(model, optimizer, 0)
    before = copied(state)
    after, metrics = language_step(graphdef, optimizer, state, jax.tree.map(jnp.asarray, batch()))
    return before, after, metrics


def test_loss_is_the_mean_over_what_the_documents_predict(stepped):
    losses = document_losses(tiny_model(48), batch())
    assert len(losses) > 5
    np.testing.assert_allclose(stepped[2]["loss"], np.mean(losses), rtol=1e-5)


def test_total_loss_adds_the_routers(stepped):
    _, _, metrics = stepped
    added = metrics["total_loss"] - metrics["loss"]
    coefficient = tiny_model(48).cfg.router_aux_loss_coef
    np.testing.assert_allclose(added, coefficient * metrics["router/aux_loss"], rtol=1e-3)


def test_step_counts_and_moves_every_parameter(stepped):
    before, after, _ = stepped
    assert before.step == 0
    assert after.step == 1
    pairs = zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True)
    assert all((np.asarray(new) != old).any() for old, new in pairs)


def test_state_survives_its_flat_form(stepped):
    before, after, _ = stepped
    flat = {name: np.asarray(x) for name, x in to_flat(after).items()}
    assert len(flat) == len(jax.tree.leaves(after))
    assert_same(from_flat(before, flat), copied(after))


# Microbatches.


def many_rows():
    """Eight rows, some with little to predict, so that parts of the batch count differently."""
    parts = [batch(seed) for seed in range(4)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    whole["loss_mask"][:5] *= np.linspace(0, 1, 12)[None] > 0.5
    return jax.tree.map(jnp.asarray, whole)


def test_microbatches_give_the_update_of_one_batch():
    """Of loss, gradient norm and parameters; the routers balance within a part, so not theirs."""
    model = tiny_model(48)
    model.remat = "none"
    model.cfg = dataclasses.replace(model.cfg, router_aux_loss_coef=0.0)
    # SGD: AdamW would divide the rounding of small gradients by their size.
    optimizer = optax.sgd(1.0)
    graphdef, state = init_state(model, optimizer, 0)
    kept = copied(state)
    whole, expected = language_step(graphdef, optimizer, state, many_rows(), z_loss=1e-2)
    again = jax.tree.map(jnp.asarray, kept)
    split, got = language_step(graphdef, optimizer, again, many_rows(), microbatches=4, z_loss=1e-2)
    for name in ("loss", "total_loss", "grad_norm"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6)
    for before, one, other in zip(
        *(jax.tree.leaves(x.params) for x in (kept, whole, split)), strict=True
    ):
        moved = np.abs(np.asarray(one) - before).max()
        np.testing.assert_allclose(other, one, atol=1e-6 * max(moved, np.abs(before).max()))


def test_gradients_of_microbatches_are_summed_in_float32():
    """bfloat16 parameters: each part's gradient is bfloat16, their sum is not."""
    cfg = small_config(num_layers=1, layer_types=("lightning",), param_dtype="bfloat16")
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    graphs, seen = [], []

    def update(grads, state, params):
        seen.append({g.dtype.name for g in jax.tree.leaves(grads)})
        return grads, state

    optimizer = optax.GradientTransformation(lambda params: (), update)

    def make():
        model = Decoder(cfg, rngs=nnx.Rngs(0))
        graphs.append(nnx.graphdef(model))
        return init_state(model, optimizer, 0)[1]

    state = jax.eval_shape(make)
    for parts in (1, 2):
        jax.eval_shape(
            lambda s, b, n=parts: language_step(graphs[0], optimizer, s, b, microbatches=n),
            state,
            many_rows(),
        )
    assert seen == [{"bfloat16", "float32"}, {"float32"}]  # The router's is float32 anyway.


# What the backward pass finds kept.


def products_in(jaxpr):
    """Matrix products of a program, those inside its loops and calls included."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general"
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                count += products_in(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.fixture(scope="module")
def gradients():
    """Of a loss under a remat policy: a compiled function, and its arguments."""
    tokens, ids = jnp.asarray(batch()["tokens"]), jnp.asarray(IDS)

    def loss(params, graphdef):
        out = nnx.merge(graphdef, params)(tokens, segment_ids=ids, compute_logits=False)
        return jnp.sum(out.hidden**2)

    run, model = jax.jit(jax.grad(loss), static_argnums=1), tiny_model(48)

    def under(remat):
        model.remat = remat
        graphdef, params = nnx.split(model)
        return run, (params, graphdef)

    return under


def test_products_that_are_kept_are_not_computed_again(gradients):
    counts = {}
    for remat in ("products", "layer"):
        run, args = gradients(remat)
        counts[remat] = products_in(run.trace(*args).jaxpr.jaxpr)
    # Softmax attention of few tokens, and lightning's chunks, are no products of the layers'.
    projections = 3 + 4 + 2 * (1 + 3)
    assert counts["products"] <= counts["layer"] - projections + 2


@pytest.mark.slow
def test_what_is_kept_changes_no_gradient(gradients):
    found = {}
    for remat in ("none", "products"):
        run, args = gradients(remat)
        found[remat] = jax.tree.leaves(run(*args))
    for got, want in zip(found["products"], found["none"], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
