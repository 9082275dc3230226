"""The policy losses: what each token adds to the objective, and how tokens are averaged.

A loss here is an objective J to be made large. Each function gives the tokens' terms before any
averaging; `normalise` makes one number of them. The two are chosen apart, and so is the scale of
the advantages (`train.advantages`).

With r = π_θ / π_anchor of a token, Â the advantage of its sample and sg the stop of gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class Terms(NamedTuple):
    """objective: of each token; ratio: r, or GSPO's of the whole sample; clipped: where a bound was
    met, so that the weight (CISPO) or the gradient (the others) is not r's. All [N, G, T].
    """

    objective: Float[Array, "N G T"]
    ratio: Float[Array, "N G T"]
    clipped: Bool[Array, "N G T"]


def cispo(
    logprobs: Float[Array, "N G T"],
    anchor: Float[Array, "N G T"],
    advantages: Float[Array, "N G"],
    *,
    cap: float,
    floor: float = 0.0,
    trust: tuple[float, float] | None = None,
) -> Terms:
    """Clips the importance weight, never the update: sg(clip(r, floor, cap)) Â log π_θ M.

    The weight is a constant to the gradient, which flows through log π alone: differentiating
    through min(r, cap) would make the gradient r (1 + log π) Â ∇log π below the cap, with the wrong
    sign wherever π < 1/e. M is 1, or with `trust` the unified mask of eq. 7: 0 where PPO would drop
    the token, that is where Â > 0 and r > 1 + high, or Â < 0 and r < 1 - low.

    Args:
      logprobs: log π_θ of the sampled tokens, N groups of G samples.
      anchor: log π of the sampler, or of the policy before the batch's first update.
      advantages: Â.
      cap: Absolute upper bound of the weight, 1 + ε_high of the paper.
      floor: Absolute lower bound; the paper has none.
      trust: low and high of the mask; None for none.

    Source: MiniMax-M1 report, section 3.1, eq. 4-7.
    """
    ratio = jnp.exp(jax.lax.stop_gradient(logprobs) - anchor)
    weight = jax.lax.stop_gradient(jnp.clip(ratio, floor, cap))
    clipped = (ratio > cap) | (ratio < floor)
    each = jnp.broadcast_to(advantages[:, :, None], ratio.shape)
    if trust is not None:
        out = ((each > 0) & (ratio > 1 + trust[1])) | ((each < 0) & (ratio < 1 - trust[0]))
        weight, clipped = jnp.where(out, 0, weight), clipped | out
    return Terms(weight * each * logprobs, ratio, clipped)


def grpo(
    logprobs: Float[Array, "N G T"],
    anchor: Float[Array, "N G T"],
    advantages: Float[Array, "N G"],
    *,
    clip: float,
) -> Terms:
    """min(r Â, clip(r, 1 - ε, 1 + ε) Â): PPO's clip with a group's advantages; no KL term.

    Source: DeepSeekMath (arXiv 2402.03300), eq. 3. Dr. GRPO (arXiv 2503.20783) has the same terms,
    other advantages (scale "none") and another mean ("max_tokens").
    """
    return _clipped_update(logprobs, anchor, advantages, clip, clip)


def dapo(
    logprobs: Float[Array, "N G T"],
    anchor: Float[Array, "N G T"],
    advantages: Float[Array, "N G"],
    *,
    low: float,
    high: float,
) -> Terms:
    """min(r Â, clip(r, 1 - ε_low, 1 + ε_high) Â) with ε_high > ε_low.

    Unlikely tokens may then grow more than under one ε.

    Source: DAPO (arXiv 2503.14476), eq. 8.
    """
    return _clipped_update(logprobs, anchor, advantages, low, high)


def gspo(
    logprobs: Float[Array, "N G T"],
    anchor: Float[Array, "N G T"],
    advantages: Float[Array, "N G"],
    mask: Float[Array, "N G T"],
    *,
    low: float,
    high: float,
) -> Terms:
    """min(s Â, clip(s, 1 - ε_low, 1 + ε_high) Â) with s = exp(mean over the sample of log r).

    Every token of a sample has the sample's term, so that the mean over a sample is the term.

    Args:
      logprobs: log π_θ of the sampled tokens.
      anchor: As for `cispo`.
      advantages: Â.
      mask: 1 for tokens that count.
      low: ε_low.
      high: ε_high.

    Source: GSPO (arXiv 2507.18071), eq. 5-7.
    """
    tokens = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    mean = ((logprobs - anchor) * mask).sum(-1, keepdims=True) / tokens
    same = jnp.broadcast_to(mean, logprobs.shape)
    return _clipped_update(same, jnp.zeros_like(same), advantages, low, high)


def _clipped_update(
    logprobs: jax.Array, anchor: jax.Array, advantages: jax.Array, low: float, high: float
) -> Terms:
    ratio = jnp.exp(logprobs - anchor)
    each = jnp.broadcast_to(advantages[:, :, None], ratio.shape)
    free, bound = ratio * each, jnp.clip(ratio, 1 - low, 1 + high) * each
    return Terms(jnp.minimum(free, bound), jax.lax.stop_gradient(ratio), bound < free)


def normalise(
    objective: Float[Array, "N G T"],
    mask: Float[Array, "N G T"],
    lengths: Int32[Array, "N G"],
    how: str,
    max_tokens: int,
) -> Float[Array, ""]:
    """One number out of the tokens' terms x, N groups of G samples, m the mask.

        group_tokens   mean over groups of Σ m x / Σ m                       M1 eq. 4, DAPO
        tokens         Σ m x / Σ m over the update                           TRL, verl
        sample         mean over samples of Σ_t m x / Σ_t m                  GRPO, GSPO
        prompt         1/N Σ over groups of Σ m x / Σ_i |o_i|                ScaleRL
        max_tokens     Σ m x / (samples · max_tokens)                        Dr. GRPO

    Means are over the groups and samples that have a token that counts; those of `prompt` are over
    all N, and over all tokens |o_i| that the sampler gave, whether they count or not.

    Args:
      objective: x.
      mask: m, 1 for tokens that count.
      lengths: |o_i|.
      how: One of `train.cispo_config.NORMALISERS`.
      max_tokens: Longest completion.
    """
    terms = objective * mask
    if how == "tokens":
        return terms.sum() / jnp.maximum(mask.sum(), 1)
    if how == "prompt":
        given = jnp.maximum(lengths.sum(1), 1).astype(terms.dtype)
        return (terms.sum((1, 2)) / given).mean()
    counts = mask.sum((1, 2)) if how == "group_tokens" else mask.sum(2)
    parts = jnp.maximum(jnp.sum(counts > 0), 1).astype(terms.dtype)
    if how == "max_tokens":
        return terms.sum() / (parts * max_tokens)
    sums = terms.sum((1, 2)) if how == "group_tokens" else terms.sum(2)
    return jnp.sum(sums / jnp.maximum(counts, 1)) / parts


def token_weights(
    mask: Float[Array, "N G T"], lengths: Int32[Array, "N G"], how: str, max_tokens: int
) -> Float[Array, "N G T"]:
    """What a token's term is multiplied by in `normalise`, which is linear in the terms."""
    nothing = jnp.zeros_like(mask)
    return jax.grad(normalise)(nothing, mask, lengths, how, max_tokens)


def clip_stats(
    terms: Terms, advantages: Float[Array, "N G"], mask: Float[Array, "N G T"]
) -> dict[str, jax.Array]:
    """Mean and largest ratio; share of tokens at a bound, of those to be made likelier and of those
    to be made less likely.
    """
    each = jnp.broadcast_to(advantages[:, :, None], mask.shape)
    clipped = terms.clipped.astype(mask.dtype)

    def share(of: jax.Array) -> jax.Array:
        counted = of.astype(mask.dtype) * mask
        return (clipped * counted).sum() / jnp.maximum(counted.sum(), 1)

    return {
        "ratio/mean": (terms.ratio * mask).sum() / jnp.maximum(mask.sum(), 1),
        "ratio/max": (terms.ratio * mask).max(),
        "clipped/positive": share(each > 0),
        "clipped/negative": share(each < 0),
    }


def agreement(
    logprobs: Float[Array, "N G T"], behaviour: Float[Array, "N G T"], mask: Float[Array, "N G T"]
) -> dict[str, jax.Array]:
    """How the trainer's probabilities of the sampled tokens agree with the sampler's: Pearson's
    correlation, the largest and the mean difference of probabilities, the largest of log π.

    Source: MiniMax-M1 report, section 3.2, figure 3.
    """
    trainer, sampler = jnp.exp(jax.lax.stop_gradient(logprobs)), jnp.exp(behaviour)
    total = jnp.maximum(mask.sum(), 1)

    def mean(x: jax.Array) -> jax.Array:
        return (x * mask).sum() / total

    a, b = trainer - mean(trainer), sampler - mean(sampler)
    spread = jnp.sqrt(mean(a * a) * mean(b * b))
    apart = jnp.abs(trainer - sampler)
    log_apart = jnp.abs(jax.lax.stop_gradient(logprobs) - behaviour)
    return {
        # Where all probabilities are alike there is nothing to correlate.
        "probability/correlation": jnp.where(spread > 0, mean(a * b) / spread, 1),
        "probability/difference_max": (apart * mask).max(),
        "probability/difference_mean": mean(apart),
        "probability/log_difference_max": (log_apart * mask).max(),
    }
