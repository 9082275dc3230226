"""Which tokenizer a job uses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mmjax.tokenizer import Tokenizer
from train.config import JobConfig
from train.data.tokenizer import train_tokenizer


def job_tokenizer(cfg: JobConfig, workdir: Path, texts: Iterable[str]) -> Tokenizer:
    """The workdir's own if the job has run before, else that of `data.tokenizer` or of
    `init_from`, else a new one of at most model.vocab_size ids trained on the texts.

    Raises:
      TokenizerError: it cannot be read, or lacks a mark of the chat template, which the job uses.
    """
    folders = [workdir] if (workdir / "tokenizer.json").exists() else []
    folders += [Path(folder) for folder in (cfg.data.tokenizer, cfg.init_from) if folder]
    if not folders:
        words = cfg.data.source == "text"
        return train_tokenizer(texts, cfg.model.vocab_size, words=words)
    tokenizer = Tokenizer.load(folders[0])
    plain = cfg.data.source == "text" and cfg.task != "cispo"
    if not plain or any(source.kind != "text" for source in cfg.data.sources):
        tokenizer.check_turns()
    return tokenizer
