"""AdamW with M1's constants, warm-up, decay and clipping, from Optax."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

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


def is_frozen(params: Any, frozen: Sequence[str]) -> Any:
    """Whether a pattern matches each parameter, in the same tree.

    Args:
      params: Parameters.
      frozen: Patterns of names such as "vision.*", see `fnmatch`.
    """

    def one(path: tuple[Any, ...], _: Any) -> bool:
        name = ".".join(re.findall(r"\w+", jax.tree_util.keystr(path)))
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in frozen)

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(
    cfg: OptimizerConfig, updates: int, frozen: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; norm scales and biases are not decayed.

    Args:
      cfg: AdamW's settings.
      updates: Length of the job.
      frozen: Patterns of parameters that stay as they are and take no moments.

    Source: MiniMax-M1 report, section 3.2 (betas, eps).
    """

    def decayed(params: optax.Params) -> optax.Params:
        # Layers are stacked on two leading axes, so a norm scale has up to three or four.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not re.search("norm|bias", jax.tree_util.keystr(path)), params
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
    trained = optax.chain(clip, adamw)
    if not frozen:
        return trained

    def labels(params: optax.Params) -> Any:
        names = {True: "frozen", False: "trained"}
        return jax.tree.map(names.__getitem__, is_frozen(params, frozen))

    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)
