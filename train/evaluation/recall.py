"""What supervised fine-tuning on the synthetic tasks reads, and with which tokenizer."""

from __future__ import annotations

from pathlib import Path

from mmjax.tokenizer import Tokenizer
from train.config import JobConfig
from train.evaluation.examples import RecallExamples
from train.evaluation.lexicon import word_tokenizer
from train.evaluation.loop import suite_of
from train.tokenizing import job_tokenizer


def recall_tokenizer(cfg: JobConfig, workdir: Path) -> Tokenizer:
    """The workdir's own, that of `data.tokenizer` or of `init_from`; else one of the tasks' words.

    Args:
      cfg: With data.source "recall".
      workdir: Folder of the job.
    """
    if (workdir / "tokenizer.json").exists() or cfg.data.tokenizer or cfg.init_from:
        return job_tokenizer(cfg, workdir, ())
    return word_tokenizer()


def recall_examples(cfg: JobConfig, tokenizer: Tokenizer) -> RecallExamples:
    """Examples of the job's tasks, none of which has a prompt that the job is evaluated on."""
    suite = suite_of(cfg, tokenizer)
    exclude = suite.prompts if suite else frozenset()
    return RecallExamples(cfg.data, tokenizer, cfg.seed, exclude)
