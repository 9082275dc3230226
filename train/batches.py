"""Scored groups → the arrays of each update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from train.advantages import group_advantages, has_signal
from train.cispo_config import CispoConfig
from train.rollout import Group


class Batch[A: (jax.Array, np.ndarray)](NamedTuple):
    """One update's N groups of G samples: sequences [N, G, P + T or more] int32 (prompt and
    completion without a gap), prompt_lengths and completion lengths [N, G]; per completion token
    [N, G, T]: tokens, behaviour and anchor (log-probabilities) and mask (zero in a group without a
    signal, and for tokens that were forced); advantages [N, G]. Devices get it by sample, N G
    instead of N, G.
    """

    sequences: A
    prompt_lengths: A
    lengths: A
    tokens: A
    behaviour: A
    anchor: A
    mask: A
    advantages: A


def by_sample[A: (jax.Array, np.ndarray)](batch: Batch[A]) -> Batch[A]:
    """The rows that devices share, a group's side by side."""
    return Batch(*(x.reshape(-1, *x.shape[2:]) for x in batch))


def by_group[A: (jax.Array, np.ndarray)](batch: Batch[A], samples: int) -> Batch[A]:
    """The inverse of `by_sample`, G samples a group."""
    return Batch(*(x.reshape(-1, samples, *x.shape[1:]) for x in batch))


def minibatches(
    groups: Sequence[Group], rl: CispoConfig, limit: int, multiple: int = 1
) -> list[Batch[np.ndarray]]:
    """Whole groups dealt out to the updates, those with a signal evenly.

    Args:
      groups: N scored groups; N a multiple of the updates.
      rl: For the updates, the scale of the advantages and the widths.
      limit: Longest completion, tokens.
      multiple: Of which the length of the sequences is one, for a mesh that splits them.
    """
    rewards = np.stack([group.rewards for group in groups])
    kept = has_signal(rewards)
    advantages = group_advantages(rewards, rl.loss.advantage_scale)
    width = bucket(max(int(g.lengths.max()) for g in groups), rl.length_buckets, limit)
    behaviour = _padded([g.behaviour for g in groups], width)
    tokens = _padded([g.tokens for g in groups], width)
    lengths = np.stack([g.lengths for g in groups])
    real = np.arange(width)[None, None] < lengths[:, :, None]
    mask = real & ~_padded([g.forced for g in groups], width) & kept[:, None, None]
    whole = Batch(
        sequences=_sequences(groups, rl.max_prompt_tokens + width, multiple),
        prompt_lengths=np.stack([np.full_like(g.lengths, len(g.prompt)) for g in groups]),
        lengths=lengths,
        tokens=tokens,
        behaviour=behaviour,
        anchor=behaviour,
        mask=mask.astype(np.float32),
        advantages=advantages,
    )
    order, updates = np.argsort(~kept, kind="stable"), rl.updates_per_batch
    return [Batch(*(x[order[i::updates]] for x in whole)) for i in range(updates)]


def bucket(longest: int, buckets: int, limit: int) -> int:
    """The least of the widths limit / buckets, 2 limit / buckets … that holds `longest`."""
    step = -(-limit // buckets)
    return min(-(-longest // step) * step, limit)


def _padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """[G, T] of several groups as [N, G, width]."""
    out = np.zeros((len(rows), rows[0].shape[0], width), rows[0].dtype)
    for place, row in zip(out, rows, strict=True):
        place[:, : row.shape[1]] = row
    return out


def _sequences(groups: Sequence[Group], least: int, multiple: int) -> np.ndarray:
    width = -(-least // multiple) * multiple
    out = np.zeros((len(groups), len(groups[0].lengths), width), np.int32)
    for row, group in zip(out, groups, strict=True):
        start = len(group.prompt)
        row[:, :start] = group.prompt
        row[:, start : start + group.tokens.shape[1]] = group.tokens
    return out
