"""Supervised fine-tuning: prompts with worked solutions; only the solution is predicted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from mmjax.config import ConfigError
from mmjax.tokenizer import Tokenizer
from train import pictures
from train.config import JobConfig
from train.data.packing import Example
from train.data.pipeline import make_stream
from train.data.reasoning import (
    ReasoningProblems,
    prompt_text,
    split_problems,
    worked_solution,
)
from train.evaluation import recall
from train.job import Job
from train.language import fit
from train.tokenizing import job_tokenizer


def run(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job.

    Args:
      cfg: With data.source "reasoning", "recall" or "pictures".
      workdir: Folder of the job.

    Raises:
      ConfigError: a solution does not fit a row.
    """
    if cfg.data.source == "pictures":
        return pictures.run(cfg, workdir)
    if cfg.data.source == "recall":
        return recall.run(cfg, workdir)
    problems, _ = split_problems(cfg.data.tasks, cfg.data.size, cfg.cispo.eval_problems, cfg.seed)
    texts = [prompt_text(p) + worked_solution(p) for p in problems]
    tokenizer = job_tokenizer(cfg, workdir, texts)
    job = Job(cfg, workdir, tokenizer, cfg.steps)
    return fit(job, partial(make_stream, tokenizer=tokenizer))


def examples_of(cfg: JobConfig, tokenizer: Tokenizer) -> list[Example]:
    """Problems with their solutions, of which some answer at once.

    Raises:
      ConfigError: a solution does not fit a row.
    """
    problems, _ = split_problems(cfg.data.tasks, cfg.data.size, cfg.cispo.eval_problems, cfg.seed)
    return _examples(problems, tokenizer, cfg)


def _examples(problems: ReasoningProblems, tokenizer: Tokenizer, cfg: JobConfig) -> list[Example]:
    length = cfg.data.sequence_length
    direct = np.random.default_rng(cfg.seed).random(len(problems)) < cfg.data.direct_share
    examples = []
    for problem, answer_at_once in zip(problems, direct, strict=True):
        prompt = tokenizer.encode(prompt_text(problem))
        solution = tokenizer.encode(worked_solution(problem, thinking=not answer_at_once))
        if len(prompt) + len(solution) > length:
            raise ConfigError(
                f"a worked solution takes {len(prompt) + len(solution)} tokens, "
                f"data.sequence_length is {length}: {problem.question!r}"
            )
        examples.append(Example(prompt + solution, [0] * len(prompt) + [1] * len(solution)))
    return examples
