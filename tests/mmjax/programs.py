"""Compiled calls that many tests share, and small models that are quick to build."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.cache import HybridCache
from mmjax.config import ModelConfig
from mmjax.convert.params import abstract_decoder


@nnx.jit
def forward(model, tokens, segment_ids=None, positions=None):
    return model(tokens, segment_ids=segment_ids, positions=positions, return_intermediates=True)


@nnx.jit
def extend(model, tokens, cache, segment_ids=None):
    """(logits, cache) after more tokens."""
    out = model(tokens, segment_ids=segment_ids, cache=cache)
    return out.logits, out.cache


def decode(model, tokens, cache):
    """Feeds tokens [B, n] one at a time; logits [B, n, vocab] and the last cache."""
    logits = []
    for t in range(tokens.shape[1]):
        step, cache = extend(model, tokens[:, t : t + 1], cache)
        logits.append(step[:, 0])
    return jnp.stack(logits, 1), cache


def empty_cache(model, batch, capacity):
    return HybridCache.create(model.cfg, batch, capacity)


def small_config(**overrides):
    """Three layers, both kinds, every axis of another size."""
    values = {
        "vocab_size": 48,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "layer_types": ("lightning", "softmax", "lightning"),
        "rotary_dim": 4,
    } | overrides
    return ModelConfig.tiny(**values)


def random_model(cfg, seed=0):
    """A decoder with normal weights of the scale of the golden cases'; norms are near one."""
    rng = np.random.default_rng(seed)
    structure, state = abstract_decoder(cfg)

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape)
        value = 1 + 0.1 * value if "norm" in jax.tree_util.keystr(path) else 0.2 * value
        return jnp.asarray(value, leaf.dtype)

    return nnx.merge(structure, jax.tree_util.tree_map_with_path(draw, state))


def with_config(model, **changes):
    """The same parameters under another configuration."""
    cfg = dataclasses.replace(model.cfg, **changes)
    structure, _ = abstract_decoder(cfg)
    return nnx.merge(structure, nnx.state(model))


def tokens(cfg, batch, length, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, cfg.vocab_size, (batch, length)), jnp.int32)
