"""Caches: KV for the softmax layers, one constant-size state for each lightning layer.

`HybridCache` has a row of its own for each sequence of a batch. `PagedCache` holds the sequences of
an engine in pools, keys and values in pages, of which a batch names those that it runs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmjax.config import LIGHTNING, SOFTMAX, ModelConfig
from mmjax.sharding import constrain


class HybridCache(NamedTuple):
    """What a row remembers of its tokens so far. A row is one sequence.

    Attributes:
      keys: [N softmax layers, B, S, G, K], RoPE applied; slot t holds the row's t-th real token,
        whichever side the padding was on.
      values: [N, B, S, G, K].
      state: [M lightning layers, B, H, K, V] float32.
      length: [B] int32, real tokens so far.
    """

    keys: jax.Array
    values: jax.Array
    state: jax.Array
    length: jax.Array

    @classmethod
    def create(
        cls, cfg: ModelConfig, batch: int, capacity: int, dtype: str | None = None
    ) -> HybridCache:
        """An empty cache for `batch` rows of at most `capacity` tokens, spread over the mesh.

        Args:
          cfg: The model's configuration.
          batch: Rows.
          capacity: S, tokens that a row can hold.
          dtype: Of keys and values; None for the activations'.
        """
        softmax, lightning = cfg.kinds.count(SOFTMAX), cfg.kinds.count(LIGHTNING)
        kv = (softmax, batch, capacity, cfg.num_kv_heads, cfg.head_dim)
        state = (lightning, batch, cfg.num_heads, cfg.head_dim, cfg.head_dim)
        into = (None, "batch", None, "kv_heads", None)
        return cls(
            keys=constrain(jnp.zeros(kv, dtype or cfg.dtype), *into),
            values=constrain(jnp.zeros(kv, dtype or cfg.dtype), *into),
            state=constrain(jnp.zeros(state, jnp.float32), None, "batch", "heads", None, None),
            length=jnp.zeros(batch, jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """S, tokens that a row can hold."""
        return self.keys.shape[2]


class PagedCache(NamedTuple):
    """What many sequences remember, in pools, and which of them the B rows of a batch are.

    Attributes:
      keys: [N softmax layers, P, G, page, K], P pages of the same number of tokens, RoPE applied.
      values: [N, P, G, page, K].
      state: [M lightning layers, S, H, K, V] float32, S states.
      table: [B, W] int32: the row's pages in the order of its tokens; any page where it has none.
      slots: [B] int32: the row's state, no two rows the same one; negative for an idle row.
      length: [B] int32, tokens of the row so far.
    """

    keys: jax.Array
    values: jax.Array
    state: jax.Array
    table: jax.Array
    slots: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.table.shape[1] * self.keys.shape[3]
