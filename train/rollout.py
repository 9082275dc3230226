"""Prompts → completions → rewards, in groups of samples of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from mmjax.engine import SamplingParams, generate
from mmjax.engine.generate import PromptError, pad_prompts
from mmjax.model import Decoder
from mmjax.tokenizer import Tokenizer
from train.data.reasoning import Problem, ReasoningProblems, prompt_text
from train.rewards.scoring import score_completions


class Rollouts(NamedTuple):
    """N groups of G samples.

    prompts [N, P] and prompt_lengths [N] int32; tokens [N, G, T] int32 and behaviour [N, G, T]
    float32 (log-probability when drawn), zero past lengths [N, G]; finished [N, G] bool;
    rewards [N, G] float32; failures: verifiers that raised; texts: completions, row after row.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    tokens: np.ndarray
    behaviour: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    rewards: np.ndarray
    failures: int
    texts: list[str]


def roll_out(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: ReasoningProblems,
    chosen: Sequence[Problem],
    params: SamplingParams,
    key: jax.Array,
    *,
    samples: int,
    max_prompt_tokens: int,
) -> Rollouts:
    """Samples each problem `samples` times and scores the completions.

    Raises:
      PromptError: a prompt is longer than max_prompt_tokens.
    """
    encoded = [tokenizer.encode(prompt_text(p)) for p in chosen]
    longest = max(map(len, encoded))
    if longest > max_prompt_tokens:
        raise PromptError(
            f"a prompt takes {longest} tokens, cispo.max_prompt_tokens is {max_prompt_tokens}"
        )
    prompts, lengths = pad_prompts(encoded, max_prompt_tokens)
    drawn = jax.device_get(generate(model, prompts, lengths, params, key, samples=samples))
    end = tokenizer.backend.id_to_token(tokenizer.eos_id)
    assert end is not None
    texts = [
        tokenizer.decode(row[:n]).removesuffix(end)
        for row, n in zip(drawn.tokens, drawn.length, strict=True)
    ]
    asked = [problem for problem in chosen for _ in range(samples)]
    scores = score_completions(problems, asked, texts, drawn.finished)
    rewards = np.array([s.reward for s in scores], np.float32)

    def grouped(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(chosen), samples, *x.shape[1:])

    return Rollouts(
        prompts,
        lengths,
        grouped(drawn.tokens),
        grouped(drawn.logprobs),
        grouped(drawn.length),
        grouped(drawn.finished),
        grouped(rewards),
        sum(s.failed for s in scores),
        texts,
    )
