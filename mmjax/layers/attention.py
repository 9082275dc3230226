"""The softmax attention layer: projections, partial RoPE, KV cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.numerics import fill_rows
from mmjax.cache import PagedCache
from mmjax.config import ModelConfig
from mmjax.layers import weights
from mmjax.layers.rope import apply_rope
from mmjax.parallel import sequence

type _QKV = tuple[jax.Array, jax.Array, jax.Array]


class SoftmaxAttention(nnx.Module):
    """Grouped-query attention, RoPE on the first `rotary_dim` dimensions of a head.

    Source: MiniMax-01 (arXiv 2501.08313), section 2.1, and the released modeling_minimax_m1.py.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        d, h, g, k = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        dtype = cfg.param_dtype
        into = ("d_model", "heads", None)
        kv = ("d_model", "kv_heads", None)
        self.q = weights.weight(rngs, (d, h, k), into, dtype, fan_in=d, fan_out=h * k)
        self.k = weights.weight(rngs, (d, g, k), kv, dtype, fan_in=d, fan_out=g * k)
        self.v = weights.weight(rngs, (d, g, k), kv, dtype, fan_in=d, fan_out=g * k)
        self.out = weights.weight(
            rngs, (h, k, d), ("heads", None, "d_model"), dtype, fan_in=h * k, fan_out=d
        )
        self.shape = h, g, k
        # q, k and v side by side [D, (H + 2 G) K], once they are fused.
        self.fused: nnx.Param[jax.Array] | None = nnx.data(None)

    def fuse_projections(self) -> None:
        """Keeps q, k and v as one matrix from here on, to serve: one product reads all three."""
        self.fused = weights.side_by_side(self.q, self.k, self.v)
        del self.q, self.k, self.v

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float32[Array, "B T R"],
        *,
        segment_ids: Int32[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Attends causally within segments of x itself."""
        q, k, v = self._project(x, angles)
        batch, length = x.shape[:2]
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        if segment_ids is not None:
            index = jnp.where(segment_ids != 0, index, -1)
        out = sequence.softmax(q, k, v, index, segment_ids)
        return self._output(out)

    def extend(
        self,
        x: Float[Array, "B T D"],
        angles: Float32[Array, "B T R"],
        slots: Int32[Array, "B T"],
        keys: Float[Array, "N B S G K"],
        values: Float[Array, "N B S G K"],
        layer: Int32[Array, ""],
    ) -> tuple[Float[Array, "B T D"], Float[Array, "N B S G K"], Float[Array, "N B S G K"]]:
        """Writes x's keys and values into layer `layer` of the cache and attends over it.

        Args:
          x: Layer input [B, T, D].
          angles: RoPE angles [B, T, R].
          slots: Cache slot of each token [B, T]; S or more for padding, which is not written.
          keys: Cached keys of all N softmax layers [N, B, S, G, K], RoPE applied.
          values: Cached values [N, B, S, G, K].
          layer: Which of the N layers this is.
        """
        q, k, v = self._project(x, angles)
        out, keys, values = sequence.softmax_on_cache(q, k, v, slots, keys, values, layer)
        return self._output(out), keys, values

    def extend_pages(
        self,
        x: Float[Array, "B T D"],
        angles: Float32[Array, "B T R"],
        slots: Int32[Array, "B T"],
        cache: PagedCache,
        layer: Int32[Array, ""],
    ) -> tuple[Float[Array, "B T D"], PagedCache]:
        """`extend` on the rows' pages: slots counts a row's tokens, its capacity for padding."""
        out, cache = _on_pages(self._project(x, angles), slots, cache, layer)
        return self._output(out), cache

    def step(
        self,
        x: Float[Array, "Q D"],
        angles: Float32[Array, "B 1 R"],
        slots: Int32[Array, "B 1"],
        cache: PagedCache,
        layer: Int32[Array, ""],
    ) -> tuple[Float32[Array, "P Y D"], PagedCache]:
        """`extend_pages` by one token of B rows on one device, with fused projections; the output
        in parts to sum. Rows of x past them are ignored.
        """
        rows = len(angles)
        flat = [part[:rows, None] for part in self._products(x)]
        out, cache = _on_pages(self._with_heads(flat, angles), slots, cache, layer)
        out = fill_rows(out.reshape(rows, -1), weights.ROW_ALIGN)
        return weights.project_in_parts(out, self.out[...]), cache

    def _project(self, x: jax.Array, angles: jax.Array) -> _QKV:
        return self._with_heads(self._products(x), angles)

    def _products(self, x: jax.Array) -> list[jax.Array]:
        """x times what makes q, k and v of it, [..., heads and their dimensions]."""
        if self.fused is None:
            return [weights.project(x, kernel[...]) for kernel in (self.q, self.k, self.v)]
        heads, groups, dim = self.shape
        ends = [heads * dim, (heads + groups) * dim]
        return jnp.split(weights.project(x, self.fused[...]), ends, axis=-1)

    def _with_heads(self, flat: list[jax.Array], angles: jax.Array) -> _QKV:
        q, k, v = (part.reshape(*part.shape[:2], -1, self.shape[2]) for part in flat)
        return apply_rope(q, angles), apply_rope(k, angles), v

    def _output(self, out: jax.Array) -> jax.Array:
        return weights.project(out.reshape(*out.shape[:2], -1), self.out[...])


def _on_pages(
    qkv: _QKV, slots: jax.Array, cache: PagedCache, layer: jax.Array
) -> tuple[jax.Array, PagedCache]:
    out, keys, values = sequence.softmax_on_pages(*qkv, slots, cache, layer)
    return out, cache._replace(keys=keys, values=values)
