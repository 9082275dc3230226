"""What each sample of a group is worth beside the others of its prompt."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def has_signal(rewards: Float[np.ndarray, "N G"]) -> Bool[np.ndarray, " N"]:
    """Which groups say anything: where all rewards are equal there is no gradient.

    Source: DAPO (arXiv 2503.14476), section 3.2.
    """
    return np.asarray(rewards.max(axis=1) > rewards.min(axis=1))


def group_advantages(
    rewards: Float[np.ndarray, "N G"], scale: str = "group"
) -> Float[np.ndarray, "N G"]:
    """Â_i = (R_i - mean of the group) / scale; zero in a group without a signal.

        group   the group's own standard deviation (GRPO, M1's eq. 5)
        batch   the root mean square of R - mean over all groups with a signal (ScaleRL)
        none    1 (Dr. GRPO: dividing by it weighs very easy and very hard prompts more)

    Args:
      rewards: Of N groups of G samples.
      scale: One of `train.cispo_config.SCALES`.

    Source: MiniMax-M1 report, eq. 5; ScaleRL (arXiv 2510.13786); Dr. GRPO (arXiv 2503.20783).
    """
    kept = has_signal(rewards)
    if not kept.any():
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    centred[~kept] = 0
    if scale == "none":
        return centred
    if scale == "batch":
        return np.asarray(centred / np.sqrt(np.mean(centred[kept] ** 2)))
    own = np.sqrt(np.mean(centred**2, axis=1, keepdims=True))
    return np.asarray(centred / np.where(kept[:, None], own, 1))
