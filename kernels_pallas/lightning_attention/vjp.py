"""What the implementations' own VJPs share: their residuals are the inputs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# q, k, v, decay, segment_ids (or None), initial_state.
type Arguments = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]
type Cotangents = tuple[jax.Array | np.ndarray | None, ...]


def keep_inputs(attend: Callable[..., Any]) -> Callable[..., tuple[Any, Arguments]]:
    """The forward rule of `attend`, whose arguments are `Arguments` and static ones behind them."""

    def forward(*args: Any) -> tuple[Any, Arguments]:
        return attend(*args), args[:6]

    return forward


def of_inputs(
    args: Arguments, d_q: jax.Array, d_k: jax.Array, d_v: jax.Array, d_initial: jax.Array
) -> Cotangents:
    """The cotangents of `Arguments`, in their order: decay and segments have none."""
    *_, decay, segment_ids, _ = args
    d_segments = None if segment_ids is None else np.zeros(segment_ids.shape, jax.dtypes.float0)
    return d_q, d_k, d_v, jnp.zeros_like(decay), d_segments, d_initial
