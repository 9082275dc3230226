"""What a model makes of texts and tasks, in forward passes alone or by generating.

Teacher forcing counts an answer as right if every token of it, the end token included, is the
likeliest one after the prompt and the right tokens before it. That is when greedy decoding writes
exactly this answer, so both tell the same, and one forward pass on prompt and answer is cheaper
than a prefill and a decode step for each token. What it cannot tell is a right answer in other
words: for models that were not trained on the tasks, `generated_hits` looks for the values
anywhere in what the engine wrote, as RULER does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int32

from mmjax import Engine, SamplingParams
from mmjax.model import Decoder
from mmjax.sharding import DEFAULT_RULES
from mmjax.tokenizer import Tokenizer
from train.losses import token_logprobs

# Tokens that a generated answer may be longer than the right one.
_SLACK = 32


class Prepared:
    """Prompts with their answers as rows of one length.

    Args:
      pairs: Ids of each prompt and answer.
      length: T, tokens of a row; both together fit.
    """

    def __init__(self, pairs: Sequence[tuple[list[int], list[int]]], length: int) -> None:
        longest = max(len(answer) for _, answer in pairs)
        self.tokens = np.zeros((len(pairs), length), np.int32)
        self.segments = np.zeros((len(pairs), length), np.int32)
        # Of each answer's tokens [N, A]: the place before it, -1 past the answer's end.
        self.before = np.full((len(pairs), longest), -1, np.int32)
        for row, (prompt, answer) in enumerate(pairs):
            size = len(prompt) + len(answer)
            self.tokens[row, :size] = prompt + answer
            self.segments[row, :size] = 1
            self.before[row, : len(answer)] = np.arange(len(prompt) - 1, size - 1)


class Scorer:
    """Forward passes of one model on its mesh.

    Args:
      graphdef: Of the model.
      mesh: That its parameters lie on.
    """

    def __init__(self, graphdef: nnx.GraphDef[Decoder], mesh: Mesh) -> None:
        self.graphdef, self._mesh = graphdef, mesh
        self._rows = int(np.prod([mesh.shape[axis] for axis in DEFAULT_RULES.batch]))
        self._sharding = NamedSharding(mesh, DEFAULT_RULES.spec(("batch",), of="batch"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._hits = jax.jit(partial(_hits, graphdef), out_shardings=everywhere)
        self._logprobs = jax.jit(partial(_logprobs, graphdef), out_shardings=everywhere)

    def hits(self, params: nnx.State, rows: Prepared, tokens: int) -> np.ndarray:
        """Which answers are right [N] bool.

        Args:
          params: Of the model.
          rows: Prompts and answers.
          tokens: About as many are computed at a time.
        """
        arrays = (rows.tokens, rows.segments, rows.before)
        return self._in_batches(self._hits, params, arrays, tokens)

    def logprobs(
        self, params: nnx.State, tokens: np.ndarray, segments: np.ndarray, at_a_time: int
    ) -> np.ndarray:
        """Log-probability of each token after those before it [N, T - 1] float32.

        Args:
          params: Of the model.
          tokens: [N, T] int32.
          segments: [N, T] int32, 0 for padding.
          at_a_time: About as many tokens are computed at a time.
        """
        return self._in_batches(self._logprobs, params, (tokens, segments), at_a_time)

    def _in_batches(
        self, run: object, params: nnx.State, arrays: tuple[np.ndarray, ...], tokens: int
    ) -> np.ndarray:
        assert callable(run)
        count, length = arrays[0].shape
        size = max(tokens // length // self._rows, 1) * self._rows
        found = []
        with jax.set_mesh(self._mesh):
            for start in range(0, count, size):
                # The last batch is filled up with copies of its last row.
                rows = np.minimum(np.arange(start, start + size), count - 1)
                found.append(run(params, *(self._put(x[rows]) for x in arrays)))
        return np.concatenate(jax.device_get(found))[:count]

    def _put(self, x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, self._sharding, x.__getitem__)


def _hits(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: Int32[Array, "B T"],
    segments: Int32[Array, "B T"],
    before: Int32[Array, "B A"],
) -> Bool[Array, " B"]:
    model = nnx.merge(graphdef, params)
    hidden = model(tokens, segment_ids=segments, compute_logits=False).hidden
    place = jnp.maximum(before, 0)
    asked = jnp.take_along_axis(hidden, place[..., None], axis=1)
    wanted = jnp.take_along_axis(tokens, place + 1, axis=1)

    def one(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        h, target = x
        return jnp.argmax(model.logits(h[:, None])[:, 0], axis=-1) == target

    # One token of all answers at a time: [B, A, vocab] would be gigabytes for a large vocabulary.
    right = jax.lax.map(one, (asked.swapaxes(0, 1), wanted.T)).T
    return jnp.all(right | (before < 0), axis=1)


def _logprobs(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: Int32[Array, "B T"],
    segments: Int32[Array, "B T"],
) -> Float32[Array, "B S"]:
    model = nnx.merge(graphdef, params)
    hidden = model(tokens, segment_ids=segments, compute_logits=False).hidden
    return token_logprobs(model, hidden, jnp.roll(tokens, -1, axis=1))[:, :-1]


def generated_hits(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    values: Sequence[tuple[str, ...]],
    *,
    answer_tokens: int,
    slots: int,
) -> np.ndarray:
    """Share of each prompt's values that the model's greedy answer names [N] float32.

    Args:
      model: The decoder.
      tokenizer: Its tokenizer.
      prompts: Ids of each.
      values: What each answer has to name, in any order and among any words.
      answer_tokens: Of the longest right answer; some more are granted.
      slots: Prompts that run side by side.

    Source: RULER, section 4: string_match_all.
    """
    limit = answer_tokens + _SLACK
    longest = max(map(len, prompts)) + limit
    engine = Engine(
        model, tokenizer, max_slots=min(slots, len(prompts)), max_length=longest, num_prefixes=0
    )
    params = SamplingParams(max_tokens=limit, temperature=0.0)
    shares = []
    for done, wanted in zip(engine.generate(prompts, params), values, strict=True):
        shares.append(np.mean([value.lower() in done.text.lower() for value in wanted]))
    return np.array(shares, np.float32)
