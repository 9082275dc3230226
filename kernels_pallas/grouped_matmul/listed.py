"""All rows through the FFN of each listed group, on what multiplies contiguous groups of rows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

type _Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
type _Swiglu = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def listed_ffn_through(
    product: _Product, swiglu: _Swiglu
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """`listed_ffn` by `grouped_matmul` and `grouped_swiglu` of one implementation."""

    def run(
        x: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array, groups: jax.Array
    ) -> jax.Array:
        turns, count = groups.size, x.shape[0]
        index = jnp.arange(turns, dtype=jnp.int32)
        mine, other = groups[:, None], groups[None]
        ahead = (other < mine) | ((other == mine) & (index[None] < index[:, None]))
        place = ahead.sum(1, dtype=jnp.int32)  # of a turn among contiguous groups
        each = jnp.arange(w1.shape[0], dtype=groups.dtype)
        sizes = (groups[:, None] == each[None]).sum(0, dtype=jnp.int32) * count
        rows = jnp.broadcast_to(x[None], (turns, *x.shape)).reshape(turns * count, -1)
        out = product(swiglu(rows, w1, w3, sizes), w2, sizes)
        return out.reshape(turns, count, -1)[place]

    return run
