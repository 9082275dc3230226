"""One decoder layer: post-norm residual around attention and experts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.cache import HybridCache, PagedCache
from mmjax.config import LIGHTNING, ModelConfig
from mmjax.layers import weights
from mmjax.layers.attention import SoftmaxAttention
from mmjax.layers.lightning import LightningAttention
from mmjax.layers.moe import MoE, RouterStats
from mmjax.layers.norm import RMSNorm

type Cache = HybridCache | PagedCache


class Context(NamedTuple):
    """What every layer of one call shares.

    angles: RoPE angles [B, T, R]; segment_ids [B, T], None where attention needs none; real:
    which tokens are no padding [B, T], None for all; slots: cache slot of each token [B, T], None
    without a cache.
    """

    angles: jax.Array
    segment_ids: jax.Array | None
    real: jax.Array | None
    slots: jax.Array | None


class LayerIndex(NamedTuple):
    """A layer's own constants: decay rates [H], and its place among the layers of its kind."""

    decay: jax.Array
    place: jax.Array


class Block(nnx.Module):
    """x = norm(h); h = α x + β attn(x); y = norm(h); h = α y + β moe(y).

    The residual is the normed tensor. With `postnorm` off it is h itself.

    Source: MiniMax-01 (arXiv 2501.08313), section 2.4, and the released modeling_minimax_m1.py.
    """

    def __init__(self, cfg: ModelConfig, kind: str, rngs: nnx.Rngs) -> None:
        lightning = kind == LIGHTNING
        self.attention = (LightningAttention if lightning else SoftmaxAttention)(cfg, rngs)
        self.moe = MoE(cfg, rngs)
        norm = (cfg.hidden_size, "norm", cfg.norm_eps, cfg.param_dtype)
        self.attention_norm = RMSNorm(*norm)
        self.moe_norm = RMSNorm(*norm)
        self.attention_scales = (
            (cfg.lightning_alpha, cfg.lightning_beta)
            if lightning
            else (cfg.softmax_alpha, cfg.softmax_beta)
        )
        self.moe_scales = (cfg.mlp_alpha, cfg.mlp_beta)
        self.postnorm = cfg.postnorm

    def __call__(
        self, h: jax.Array, cache: Cache | None, index: LayerIndex, ctx: Context
    ) -> tuple[jax.Array, Cache | None, RouterStats]:
        """Runs the layer on h [B, T, D], updating its own part of the cache."""
        paged = isinstance(cache, PagedCache)
        if isinstance(cache, PagedCache) and self._why_not_step(h) is None:
            return self._step(h, cache, index, ctx)
        x = self.attention_norm(h)
        attended, cache = self._attend(x, cache, index, ctx)
        alpha, beta = self.attention_scales
        h = alpha * (x if self.postnorm else h) + beta * attended
        y = self.moe_norm(h)
        mixed, stats = self.moe(y, ctx.real, training=cache is None, skip=paged)
        return self._add_mixed(y, h, mixed), cache, stats

    def _add_mixed(self, y: jax.Array, h: jax.Array, mixed: jax.Array) -> jax.Array:
        alpha, beta = self.moe_scales
        return alpha * (y if self.postnorm else h) + beta * mixed

    def _why_not_step(self, h: jax.Array) -> str | None:
        """Why h [B, T, D] is no decode step that runs on kernels of its own; None where it is."""
        if h.shape[1] != 1:
            return "it is more than a token a row"
        if self.attention.fused is None:
            return "its projections are not fused"
        return self.moe.why_not_routed_with_norm(h)

    def _step(
        self, h: jax.Array, cache: PagedCache, index: LayerIndex, ctx: Context
    ) -> tuple[jax.Array, PagedCache, RouterStats]:
        """The same on kernels that do in one what a few rows wait for in many."""
        real = jnp.ones(h.shape[:2], bool) if ctx.real is None else ctx.real
        x = self.attention_norm.of_step(h[:, 0], weights.ROW_ALIGN)
        layer = self.attention
        if isinstance(layer, LightningAttention):
            attended, cache = layer.step(x, index.decay, cache, index.place)
        else:
            assert ctx.slots is not None
            attended, cache = layer.step(x, ctx.angles, ctx.slots, cache, index.place)
        routed = self.moe.add_norm_route(
            x if self.postnorm else h[:, 0], attended, self.moe_norm, self.attention_scales, real
        )
        h, y = (rows[: h.shape[0], None] for rows in (routed.total, routed.normed))
        mixed, stats = self.moe.visit(routed, real)
        return self._add_mixed(y, h, mixed), cache, stats

    def _attend(
        self, x: jax.Array, cache: Cache | None, index: LayerIndex, ctx: Context
    ) -> tuple[jax.Array, Cache | None]:
        layer = self.attention
        if isinstance(cache, PagedCache):
            if isinstance(layer, LightningAttention):
                return layer.extend(x, index.decay, ctx.segment_ids, cache, index.place)
            assert ctx.slots is not None
            return layer.extend_pages(x, ctx.angles, ctx.slots, cache, index.place)
        if isinstance(layer, LightningAttention):
            state = None if cache is None else cache.state[index.place]
            out, state = layer(x, index.decay, segment_ids=ctx.segment_ids, state=state)
            if cache is not None:
                # Behind the barrier XLA would read other layers' states from before this update,
                # and copy them all to keep them.
                states = jax.lax.optimization_barrier(cache.state.at[index.place].set(state))
                cache = cache._replace(state=states)
            return out, cache
        if cache is None:
            return layer(x, ctx.angles, segment_ids=ctx.segment_ids), None
        assert ctx.slots is not None
        out, keys, values = layer.extend(
            x, ctx.angles, ctx.slots, cache.keys, cache.values, index.place
        )
        return out, cache._replace(keys=keys, values=values)


def empty_stats(stats: RouterStats) -> RouterStats:
    """The statistics without the per-token logits, for calls that do not ask for them."""
    return stats._replace(logits=jnp.zeros((), jnp.float32))
