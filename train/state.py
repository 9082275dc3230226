"""TrainState: all that a resume needs of the device's side."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mmjax.model import Decoder


class TrainState(NamedTuple):
    """step: of the loop (updates, or rollout batches); params: the model's; opt_state; key:
    PRNG key of sampling, as raw data.
    """

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    key: jax.Array


def init_state(
    model: Decoder, optimizer: optax.GradientTransformation, seed: int
) -> tuple[nnx.GraphDef[Decoder], TrainState]:
    """Splits a model into its definition and a fresh state around its parameters."""
    graphdef, params = nnx.split(model)
    key = jax.random.key_data(jax.random.key(seed + 1))
    return graphdef, TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def to_flat(state: TrainState) -> dict[str, Any]:
    """Every array of the state under a name, for a checkpoint."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def from_flat(like: TrainState, flat: dict[str, Any]) -> TrainState:
    """The inverse of `to_flat`, in the structure of `like`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[jax.tree_util.keystr(path)], like)
