"""The language step on packed rows, against each document alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mmjax.programs import forward
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
