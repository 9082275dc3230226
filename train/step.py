"""The pure training step of pretrain and sft, `step(state, batch) -> (state, metrics)`, and what it
shares with dpo's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mmjax.model import Aux, Decoder, ImageTokens
from mmjax.vision.tiles import MEAN, STD
from train.losses import head_loss
from train.optimizer import apply_updates, is_frozen
from train.state import TrainState

type Batch = dict[str, jax.Array]


@partial(
    jax.jit,
    static_argnames=("graphdef", "optimizer", "frozen", "microbatches", "z_loss"),
    donate_argnames="state",
)
def language_step(
    graphdef: nnx.GraphDef[Decoder],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    frozen: tuple[str, ...] = (),
    microbatches: int = 1,
    z_loss: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One AdamW update on packed rows.

    Args:
      graphdef: Of the model.
      optimizer: From `train.optimizer`.
      state: Donated.
      batch: tokens, segment_ids, positions [B, T] int32 and loss_mask [B, T] float32, which is 1
        where the token itself is to be predicted; with pictures also tiles and image_index, see
        `train.data.packing`.
      frozen: Patterns of parameters that get no gradient.
      microbatches: Parts of B / microbatches rows that go through the model one after the other,
        their gradients summed in float32. The loss is the mean over the whole batch's tokens, so
        that any number of parts gives the same update; routers balance, and drop, within a part.
      z_loss: See `train.losses.head_loss`.
    """

    def loss_fn(params: nnx.State, part: Batch, weights: jax.Array, share: jax.Array) -> Any:
        model = nnx.merge(graphdef, without_gradient(params, frozen))
        out = model(
            part["tokens"],
            positions=part["positions"],
            segment_ids=part["segment_ids"],
            images=_image_tokens(model, part),
            compute_logits=False,
        )
        targets = jnp.roll(part["tokens"], -1, axis=1)
        loss, ce = head_loss(model, out.hidden, targets, weights, z_loss)
        aux = jax.tree.map(lambda x: share * x, out.aux)
        loss += model.cfg.router_aux_loss_coef * aux.load_balancing_loss
        return loss, ((ce, aux), ())

    weights, tokens = _loss_weights(batch), jnp.sum(batch["segment_ids"] != 0, axis=1)
    (loss, ((ce, aux), _)), grads = values_and_gradients(
        loss_fn, state.params, batch, weights, tokens, microbatches
    )
    state, norm = apply_gradients(optimizer, state, grads)
    metrics = {"loss": ce, "total_loss": loss, "grad_norm": norm, **router_metrics(aux)}
    return state._replace(step=state.step + 1), metrics


def _loss_weights(batch: Batch) -> jax.Array:
    """What the token after each position counts in the loss [B, T]; together they are 1."""
    mask = predicting(batch["segment_ids"], batch["loss_mask"])
    return mask / jnp.maximum(jnp.sum(mask), 1)


def predicting(segments: jax.Array, loss_mask: jax.Array) -> jax.Array:
    """1 where the token after a position is to be predicted from it [B, T], from its mask."""
    # The last token of a row predicts nothing, nor does one before another document.
    same = (segments == jnp.roll(segments, -1, axis=1)) & (segments != 0)
    mask = jnp.roll(loss_mask, -1, axis=1) * same.astype(jnp.float32)
    return mask.at[:, -1].set(0)


def values_and_gradients(
    loss_fn: Callable[..., Any],
    params: nnx.State,
    batch: Any,
    weights: jax.Array,
    tokens: jax.Array,
    parts: int,
) -> Any:
    """What `jax.value_and_grad` gives of a batch whose parts are taken one after the other.

    Args:
      loss_fn: `(params, part, weights, share) -> (loss, (summed, rows))`; loss and `summed` are
        sums over the part's rows, `rows` arrays of each of them; share is the part's of the batch's
        tokens.
      params: To differentiate with respect to.
      batch: A tree of arrays [B, *].
      weights: [B, *], of the whole batch.
      tokens: [B], how many each row has.
      parts: How many; of several the gradients are float32.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        return gradient(params, batch, weights, jnp.ones(()))

    def split(x: jax.Array) -> jax.Array:
        """[B, *] to [parts, B / parts, *], each part with rows of every device."""
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def joined(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def part(x: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, Any]:
        (loss, (summed, rows)), grads = gradient(params, *x)
        return (loss, summed, grads), rows

    def add(total: Any, x: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, Any]:
        found, rows = part(x)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, found), rows

    real = tokens.astype(jnp.float32)
    share = split(real / jnp.maximum(jnp.sum(real), 1)).sum(1)
    xs = (jax.tree.map(split, batch), split(weights), share)
    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], xs))[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (loss, summed, grads), rows = jax.lax.scan(add, zeros, xs)
    return (loss, (summed, jax.tree.map(joined, rows))), grads


def _image_tokens(model: Decoder, batch: Batch) -> ImageTokens | None:
    if "tiles" not in batch:
        return None
    assert model.vision is not None
    mean, std = (jnp.asarray(x).reshape(1, 1, 1, 1, 3) for x in (MEAN, STD))
    tiles = (batch["tiles"].astype(jnp.float32) / 255 - mean) / std
    return ImageTokens(model.vision.features(tiles), batch["image_index"])


def without_gradient(params: nnx.State, frozen: tuple[str, ...]) -> nnx.State:
    """The parameters, those that a pattern matches as constants."""
    stop = is_frozen(params, frozen)
    return jax.tree.map(lambda x, stopped: jax.lax.stop_gradient(x) if stopped else x, params, stop)


def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Any
) -> tuple[TrainState, jax.Array]:
    """One optimizer update; also returns the gradient norm before clipping."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = apply_updates(state.params, updates)
    # Squares of bfloat16 gradients are not to be summed in bfloat16.
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    return state._replace(params=params, opt_state=opt_state), norm


def router_metrics(aux: Aux) -> dict[str, jax.Array]:
    """Balance of the experts: aux loss (top_k when even), busiest expert's load over the mean,
    entropy in nats, share of token-slots dropped beyond their expert's capacity.
    """
    load = aux.tokens_per_expert
    busiest = load.max(axis=1) / jnp.maximum(load.mean(axis=1), 1e-9)
    return {
        "router/aux_loss": aux.load_balancing_loss,
        "router/busiest": busiest.max(),
        "router/entropy": aux.router_entropy.mean(),
        "router/dropped": aux.dropped_share.mean(),
    }
