"""The pure training step of pretrain and sft: `step(state, batch) -> (state, metrics)`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mmjax.model import Aux, Decoder, ImageTokens
from mmjax.vision.tiles import MEAN, STD
from train.losses import cross_entropy, token_logprobs
from train.optimizer import is_frozen
from train.state import TrainState

type Batch = dict[str, jax.Array]


@partial(jax.jit, static_argnames=("graphdef", "optimizer", "frozen"), donate_argnames="state")
def language_step(
    graphdef: nnx.GraphDef[Decoder],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    frozen: tuple[str, ...] = (),
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
    """

    def loss_fn(params: nnx.State) -> tuple[jax.Array, tuple[jax.Array, Aux]]:
        model = nnx.merge(graphdef, without_gradient(params, frozen))
        segments = batch["segment_ids"]
        out = model(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=segments,
            images=_image_tokens(model, batch),
            compute_logits=False,
        )
        # The last token of a row predicts nothing, nor does one before another document.
        targets = jnp.roll(batch["tokens"], -1, axis=1)
        same = (segments == jnp.roll(segments, -1, axis=1)) & (segments != 0)
        mask = jnp.roll(batch["loss_mask"], -1, axis=1) * same.astype(jnp.float32)
        mask = mask.at[:, -1].set(0)
        ce = cross_entropy(token_logprobs(model, out.hidden, targets), mask)
        loss = ce + model.cfg.router_aux_loss_coef * out.aux.load_balancing_loss
        return loss, (ce, out.aux)

    (loss, (ce, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, norm = apply_gradients(optimizer, state, grads)
    metrics = {"loss": ce, "total_loss": loss, "grad_norm": norm, **router_metrics(aux)}
    return state._replace(step=state.step + 1), metrics


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
    params = optax.apply_updates(state.params, updates)
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
