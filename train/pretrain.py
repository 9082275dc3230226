"""Pre-training: documents → packed rows → next-token prediction."""

from __future__ import annotations

from pathlib import Path

from mmjax.tokenizer import Tokenizer
from train.config import JobConfig
from train.data.packing import Example
from train.data.text import read_documents
from train.job import Job
from train.language import fit
from train.tokenizing import job_tokenizer


def run(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job.

    Args:
      cfg: With data.source "text".
      workdir: Folder of the job.
    """
    documents = read_documents(cfg.data.paths)
    tokenizer = job_tokenizer(cfg, workdir, documents)
    examples = _pieces(documents, tokenizer, cfg.data.sequence_length)
    job = Job(cfg, workdir, tokenizer, cfg.steps)
    return fit(job, job.packed_batches(examples))


def _pieces(documents: list[str], tokenizer: Tokenizer, length: int) -> list[Example]:
    """Documents, each closed by the end token, cut where they exceed a row."""
    pieces = []
    for document in documents:
        ids = [*tokenizer.encode(document), tokenizer.eos_id]
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            pieces.append(Example(piece, [1] * len(piece)))
    return pieces
