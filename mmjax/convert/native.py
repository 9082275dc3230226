"""Buffers that transformers keeps beside its MiniMax model's parameters, from the config alone.

They are part of its state, so a folder in its layout holds them. Reading ignores them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mmjax.config import LIGHTNING, ModelConfig
from mmjax.convert.table import text_key

BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


def buffer_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each float32 buffer, by key."""
    heads, block = cfg.num_heads, _block(cfg)
    shapes = ((heads, 1, 1), (heads, block, 1), (heads, block, 1), (1, heads, block, block))
    return {
        text_key(cfg, "hf-native", f"model.layers.{layer}.self_attn.{name}"): shape
        for layer, kind in enumerate(cfg.kinds)
        if kind == LIGHTNING
        for name, shape in zip(BUFFERS, shapes, strict=True)
    }


def buffer(cfg: ModelConfig, key: str) -> np.ndarray:
    """One buffer, as `MiniMaxLightningAttention` computes it.

    With decay rate s and i, j = 1..block: exp(-s i), exp(-s (block - i)), and exp(-s (i - j)) for
    i >= j.
    """
    *_, layer_text, _, name = key.split(".")
    layer = int(layer_text)
    block = _block(cfg)
    heads = np.arange(1, cfg.num_heads + 1)
    # transformers adds the 1e-5 to the divisor too, unlike the released code.
    factor = 1 - layer / (cfg.num_layers - 1 + 1e-5) + 1e-5
    slope = (2.0 ** (-8 * heads / cfg.num_heads) * factor)[:, None, None]
    i = np.arange(1, block + 1)[:, None]
    if name == "slope_rate":
        value = slope
    elif name == "query_decay":
        value = np.exp(-slope * i)
    elif name == "key_decay":
        value = np.exp(-slope * (block - i))
    else:
        distance = i - i.T
        value = np.where(distance >= 0, np.exp(-slope * np.maximum(distance, 0)), 0)[None]
    return value.astype(np.float32)


def differences(cfg: ModelConfig) -> list[str]:
    """Where transformers 5.23's model computes something else from the same folder, in words."""
    found = []
    if cfg.rotary_dim < cfg.head_dim:
        found.append(
            f"transformers (5.23) turns all {cfg.head_dim} dimensions of a head by RoPE, this "
            f"model {cfg.rotary_dim}: its logits will differ"
        )
    if not cfg.postnorm:
        found.append(
            "transformers (5.23) always carries the normed residual, this model the un-normed one "
            "(postnorm false): its logits will differ"
        )
    return found


def _block(cfg: ModelConfig) -> int:
    return dataclasses.replace(cfg, vision=None).to_hf("hf-native")["block_size"]
