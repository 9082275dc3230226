"""AdamW with M1's constants, warm-up, decay and clipping, from Optax."""

from __future__ import annotations

import jax
import optax

from train.config import OptimizerConfig


def learning_rate(cfg: OptimizerConfig, updates: int) -> optax.Schedule:
    """The rate at each update.

    Args:
      cfg: Warm-up, decay and peak.
      updates: Length of the job.
    """
    left = cfg.decay_steps or max(updates - cfg.warmup_steps, 1)
    peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_ratio
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, left, cfg.final_ratio),
        "linear": optax.linear_schedule(peak, final, left),
        "exponential": optax.exponential_decay(peak, left, cfg.final_ratio, end_value=final),
    }[cfg.decay]
    if not cfg.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / cfg.warmup_steps, peak, cfg.warmup_steps - 1)
    return optax.join_schedules([warmup, after], [cfg.warmup_steps])


def make_optimizer(cfg: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; norm scales and other vectors are not decayed.

    Source: MiniMax-M1 report, section 3.2 (betas, eps).
    """

    def decayed(params: optax.Params) -> optax.Params:
        # Layers are stacked on two leading axes, so a norm scale has up to three or four.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "norm" not in jax.tree_util.keystr(path), params
        )

    adamw = optax.adamw(
        learning_rate(cfg, updates),
        b1=cfg.b1,
        b2=cfg.b2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decayed,
    )
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    return optax.chain(clip, adamw)
