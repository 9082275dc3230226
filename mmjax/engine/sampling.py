"""How the next token is chosen: the parameters, and the draw for rows that each have their own."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

# Most alternatives that can be asked for beside a token's own log-probability.
MAX_LOGPROBS = 20
# Below it a temperature or a probability may be flushed to 0.
_LEAST_NUMBER = 1e-30


def _check_integers(name: str, values: Iterable[object], *, of_device: bool = False) -> None:
    """Raises ValueError at one that is no integer, or negative or too large for a device's."""
    for value in values:
        if not isinstance(value, (int, np.integer)):
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if of_device and not 0 <= value < 2**31:
            raise ValueError(f"{name} must be at least 0 and less than 2^31, got {value}")


@dataclasses.dataclass(frozen=True)
class RepetitionHalt:
    """Ends a sample that repeats itself: `tokens` in a row, each likelier than `probability`.

    Source: MiniMax-M1 report, section 3.2, early truncation.
    """

    tokens: int = 3000
    probability: float = 0.99

    def __post_init__(self) -> None:
        _check_integers("repetition_halt.tokens", [self.tokens], of_device=True)
        if self.tokens < 1:
            raise ValueError(f"repetition_halt.tokens must be at least 1, got {self.tokens}")
        if not 0 < self.probability < 1:
            raise ValueError(
                f"repetition_halt.probability must be in (0, 1), got {self.probability}"
            )


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample one request.

    Attributes:
      max_tokens: Most new tokens of a sample.
      temperature: Of the softmax; 0 takes the likeliest token.
      top_p: Keep the likeliest tokens that together reach this probability; 1 keeps all.
      top_k: Keep this many likeliest tokens; 0 keeps all.
      min_p: Keep tokens of at least this share of the likeliest one's probability; 0 keeps all.
      seed: The same seed draws the same tokens, whatever else runs; None draws a seed.
      n: Samples of the prompt; they share its prefill.
      stop: Texts that end a sample and are not part of its text.
      stop_ids: Further tokens that end a sample.
      logprobs: Alternatives to report beside each token's log-probability; 0 for the token's own
        alone, None for nothing.
      ignore_eos: Go on after the end token.
      thinking_budget: Tokens after which an open thinking part is closed; 0 for an empty one, None
        for no limit.
      repetition_halt: When to end a sample that repeats itself; None for never.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    thinking_budget: int | None = None
    repetition_halt: RepetitionHalt | None = RepetitionHalt()

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "n", "logprobs", "thinking_budget"):
            if (value := getattr(self, name)) is not None:
                _check_integers(name, [value])
        if not isinstance(self.stop_ids, Sequence):
            raise ValueError(f"stop_ids must be a tuple of token ids, got {self.stop_ids!r}")
        _check_integers("stop_ids", self.stop_ids, of_device=True)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be a tuple of texts that are not empty, got {self.stop!r}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must be 0 to {MAX_LOGPROBS} or None, got {self.logprobs}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ValueError(f"thinking_budget must not be negative, got {self.thinking_budget}")


class Draw(NamedTuple):
    """How each of B rows draws: temperature, top_p, min_p [B] float32, top_k [B] int32, as in
    `SamplingParams`.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array


class Wanted(enum.Enum):
    """What all rows of a burst ask for at most, from little to everything."""

    LIKELIEST = "the likeliest tokens"
    CHANCE = "tokens drawn by their probability as well"
    ANYTHING = "filters and alternatives as well"

    @classmethod
    def by(cls, params: Iterable[SamplingParams]) -> Wanted:
        """What requests with these parameters ask for."""
        wanted = cls.LIKELIEST
        for p in params:
            if p.logprobs or (p.temperature and (p.top_p < 1 or p.top_k > 0 or p.min_p > 0)):
                return cls.ANYTHING
            if p.temperature:
                wanted = cls.CHANCE
        return wanted


def draw(
    logits: Float32[Array, "B vocab"],
    seeds: jax.Array,
    drawn: Int32[Array, " B"],
    how: Draw,
    wanted: Wanted,
) -> tuple[Int32[Array, " B"], Float32[Array, "B vocab"]]:
    """Draws one token a row, each row by parameters of its own.

    What no row asks for, noise and filters, is left out while running; what `wanted` leaves out,
    while compiling.

    Args:
      logits: [B, vocab] float32.
      seeds: One PRNG key a row [B].
      drawn: Tokens that the row has drawn before [B], to be folded into its key.
      how: How to draw.
      wanted: What the rows ask for at most.

    Returns:
      The tokens [B], and log softmax(logits / temperature) [B, vocab], before top-p, top-k and
      min-p: the distribution that a trainer can compute again. At temperature 0, log
      softmax(logits).
    """
    greedy = how.temperature == 0
    # The likeliest at 0 before the division, so that no temperature takes it out of float32.
    temperature = jnp.where(greedy, 1, jnp.maximum(how.temperature, _LEAST_NUMBER))
    shifted = (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]
    logp = shifted - jnp.log(jnp.exp(shifted).sum(axis=-1, keepdims=True))

    def random() -> jax.Array:
        kept = logp
        if wanted is Wanted.ANYTHING:
            filters = ~greedy & ((how.top_p < 1) | (how.top_k > 0) | (how.min_p > 0))
            kept = jax.lax.cond(jnp.any(filters), lambda: _filtered(logp, how), lambda: logp)
        keys = jax.vmap(jax.random.fold_in)(seeds, drawn.astype(jnp.uint32))
        return jnp.where(greedy[:, None], logp, kept + _noise(keys, logp.shape[1]))

    match wanted:
        case Wanted.LIKELIEST:
            scores = logp
        case Wanted.CHANCE:
            scores = random()
        case Wanted.ANYTHING:
            scores = jax.lax.cond(jnp.all(greedy), lambda: logp, random)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32), logp


def _noise(keys: jax.Array, vocab: int) -> jax.Array:
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(keys)
    # Fused into the search for the largest, XLA draws the noise one number at a time on CPUs.
    return jax.lax.optimization_barrier(noise)


def _filtered(logp: jax.Array, how: Draw) -> jax.Array:
    """logp where min_p, top_k and, of what these leave, top_p keep a token; else -inf."""
    top = logp.max(-1, keepdims=True)
    # min_p 0 gives -inf, which keeps all.
    logp = jnp.where(logp - top >= jnp.log(how.min_p)[:, None], logp, -jnp.inf)
    kept = jnp.where(how.top_k > 0, how.top_k, logp.shape[-1]).astype(jnp.float32)
    logp = jnp.where(logp >= _least(logp, jnp.ones_like(logp), kept), logp, -jnp.inf)
    probability = jnp.exp(logp - jax.nn.logsumexp(logp, axis=-1, keepdims=True))
    least = _least(logp, probability, jnp.maximum(how.top_p, _LEAST_NUMBER))
    return jnp.where((logp >= least) | (how.top_p >= 1)[:, None], logp, -jnp.inf)


def _least(logp: jax.Array, weight: jax.Array, target: jax.Array) -> jax.Array:
    """The largest t [B, 1] such that tokens with logp >= t weigh at least `target` [B] together.

    Found bit by bit in the order of floats, which is cheaper than sorting a vocabulary.
    """
    bits = jax.lax.bitcast_convert_type(logp, jnp.int32)
    # logp <= 0: the bit patterns grow as the numbers fall, from 0 (or that of -0) to -inf.
    depth = jnp.where(logp == 0, 0, bits & 0x7FFFFFFF)
    low = jnp.full(logp.shape[:1], -1, jnp.int32)
    high = jnp.full(logp.shape[:1], 0x7F800000, jnp.int32)

    def halve(_: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = x
        middle = low + (high - low) // 2
        enough = jnp.where(depth <= middle[:, None], weight, 0).sum(-1) >= target
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, high = jax.lax.fori_loop(0, 31, halve, (low, high))
    return -jax.lax.bitcast_convert_type(high, jnp.float32)[:, None]
