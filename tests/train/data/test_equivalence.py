"""Packed and unpacked, documents have the same losses and gradients, in both kinds of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.mmjax.programs import random_model, small_config
from train.data.examples import Example
from train.data.mixture import Mixture, Pool, ordered
from train.data.packing import PackedRows
from train.data.pipeline import Held
from train.losses import token_logprobs

LENGTH, VOCAB = 24, 64
SIZES = [24, 11, 9, 5, 3, 2, 17, 7]


def packed_rows():
    """Rows of random documents."""
    rng = np.random.default_rng(0)
    documents = [
        Example(rng.integers(1, VOCAB, size), rng.integers(0, 2, size) | (np.arange(size) == 1))
        for size in SIZES
    ]
    order = ordered(Held(documents), lambda example: example, 0, 0, 1)
    rows = iter(PackedRows(Mixture([Pool("a", order, 1.0, 1.0)], 0.0), LENGTH, 10))
    return [next(rows) for _ in range(5)]


def document_losses(model, batch, number):
    """Summed negative log-probabilities of what is to be predicted of one document."""
    hidden = model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        compute_logits=False,
    ).hidden
    segments = batch["segment_ids"]
    logp = token_logprobs(model, hidden, jnp.roll(batch["tokens"], -1, axis=1))
    follows = (segments == jnp.roll(segments, -1, axis=1)) & (segments > 0)
    follows = follows.at[:, -1].set(False)
    mask = jnp.roll(batch["loss_mask"], -1, axis=1) * follows.astype(jnp.float32)
    here = (batch["document"] == number).astype(jnp.float32)
    return -jnp.sum(logp * mask * here)


def with_documents(batch):
    """The batch with a number for each document in it, from 1."""
    before = np.cumsum([0, *batch["segment_ids"].max(axis=1)])[:-1, None]
    segments = batch["segment_ids"]
    return batch | {"document": np.where(segments > 0, segments + before, 0).astype(np.int32)}


@pytest.mark.parametrize("kind", ["lightning", "softmax"])
def test_documents_do_not_know_that_they_are_packed(kind):
    model = random_model(
        small_config(num_layers=2, layer_types=(kind, kind), vocab_size=VOCAB, num_experts=2)
    )
    graphdef, params = nnx.split(model)

    @jax.jit
    def both(params, batch, number):
        return jax.value_and_grad(lambda p: document_losses(nnx.merge(graphdef, p), batch, number))(
            params
        )

    rows = packed_rows()
    batch = with_documents({k: np.stack([row[k] for row in rows]) for k in rows[0]})
    assert (batch["segment_ids"].max(axis=1) > 1).any()
    for number in range(1, int(batch["document"].max()) + 1):
        row = int(np.argmax((batch["document"] == number).any(axis=1)))
        here = batch["document"][row] == number
        alone = {k: np.zeros_like(x[:1]) for k, x in batch.items()}
        for name in ("tokens", "positions", "loss_mask", "document"):
            alone[name][0, : here.sum()] = batch[name][row, here]
        alone["segment_ids"][0, : here.sum()] = 1
        one = {k: x[row : row + 1] for k, x in batch.items()}
        (loss, grads), (expected, wanted) = (
            both(params, x, jnp.asarray(number)) for x in (one, alone)
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
            scale = max(float(jnp.abs(y).max()), 1e-3)
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * scale)
