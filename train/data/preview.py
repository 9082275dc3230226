"""`python -m train.data.preview --config=configs/NAME.py`: what the model will see.

Prints packed rows as text, a line between documents, what is predicted in green and what is only
read dimmed, and then of some batches how full they are and what was skipped. The flags are those of
`python -m train`, so that it shows what a job with the same flags would read; of a job of stages
what the first one would, or the one that --stage names.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

import train.__main__ as cli
from mmjax.config import ConfigError
from mmjax.tokenizer import Tokenizer
from train.config import JobConfig
from train.data.pipeline import make_stream
from train.data.streams import KINDS, Batch, Streams, counts
from train.errors import USER_ERRORS
from train.sft import data_tokenizer
from train.stages import Stage, resolve

_ROWS = flags.DEFINE_integer("rows", 2, "Rows to print.", lower_bound=0)
_BATCHES = flags.DEFINE_integer("batches", 20, "Batches to count.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 300, "Most tokens of a document to print.", lower_bound=2)
_STAGE = flags.DEFINE_string("stage", "", "Name of the stage to show; empty for the first.")
_PREDICTED, _READ = "green", "dim"


def preview(
    cfg: JobConfig,
    workdir: Path,
    console: Console,
    *,
    rows: int = 2,
    batches: int = 20,
    tokens: int = 300,
    stage: str = "",
) -> None:
    """Prints the first rows of a job's data, and what the first batches are made of.

    Args:
      cfg: With any data.source but "pictures".
      workdir: Where a tokenizer may be; nothing is written there.
      console: To print on.
      rows: To print.
      batches: To count.
      tokens: Most of a document to print.
      stage: Name of the stage to show, as if the job began with it; empty for the first.

    Raises:
      ConfigError: data that cannot be read, or no such stage.
    """
    if cfg.data.source == "pictures":
        raise ConfigError("data.source 'pictures' has no preview: look at the folder's pictures")
    shown = _stage(cfg, stage)
    tokenizer = data_tokenizer(cfg, workdir)
    cfg = dataclasses.replace(cfg, data=shown.data)
    if cfg.stages:
        console.print(f"stage {shown.number} of {len(cfg.stages)}, {shown.name}")
    if tokenizer.vocab_size > cfg.model.vocab_size:
        console.print(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is "
            f"{cfg.model.vocab_size}: a fresh model is given as many, a loaded one is refused"
        )
    start = shown.from_weights
    with closing(make_stream(cfg, tokenizer, steps=shown.steps, from_weights=start)) as stream:
        seen = [next(stream) for _ in range(batches)]
        for number in range(min(rows, batches * cfg.data.batch_size)):
            batch, row = divmod(number, cfg.data.batch_size)
            print_row(seen[batch], row, tokenizer, console, tokens)
        console.print(_summary(seen, stream))


def print_row(batch: Batch, row: int, tokenizer: Tokenizer, console: Console, tokens: int) -> None:
    """Prints the documents of one row."""
    segments = batch["segment_ids"][row]
    console.rule(f"row {row}: {np.count_nonzero(segments)} of {len(segments)} tokens")
    for segment in range(1, int(segments.max()) + 1):
        print_segment(batch, row, segment, tokenizer, console, tokens)
        if "rejected_tokens" in batch:
            print_segment(batch, row, segment, tokenizer, console, tokens, "rejected")


def print_segment(
    batch: Batch,
    row: int,
    segment: int,
    tokenizer: Tokenizer,
    console: Console,
    tokens: int,
    side: str = "",
) -> None:
    """Prints one document; of a pair with side "rejected" the other answer."""
    prefix = f"{side}_" if side else ""
    (here,) = np.nonzero(batch[f"{prefix}segment_ids"][row] == segment)
    mask = batch[f"{prefix}loss_mask"][row, here]
    told = f"segment {segment}{side and ', ' + side}"
    heading = f"{told}: {len(here)} tokens, {int(mask.sum())} predicted"
    console.rule(heading, characters="·", align="left", style="dim")
    ids = batch[f"{prefix}tokens"][row, here[:tokens]]
    console.print(painted(ids, mask[:tokens], tokenizer), soft_wrap=True)
    if len(here) > tokens:
        console.print(f"... {len(here) - tokens} tokens more", style="italic dim")


def painted(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> Text:
    """Tokens as text, by whether they are predicted; a stretch is decoded as a whole."""
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    for start, stop in itertools.pairwise(edges):
        style = _PREDICTED if mask[start] else _READ
        text.append(tokenizer.decode(ids[start:stop]), style)
    return text


def _summary(batches: list[Batch], stream: Streams) -> Table:
    """Fill and, by source, documents, tokens and what was skipped or changed."""
    told = counts(stream.get_state())
    segments = np.concatenate([batch["segment_ids"] for batch in batches])
    predicted = sum(float(batch["loss_mask"].sum()) for batch in batches)
    real = int(np.count_nonzero(segments))
    title = (
        f"{len(batches)} batches: {len(segments)} rows of {segments.shape[1]} tokens, "
        f"{real / segments.size:.2%} filled, {predicted / max(real, 1):.1%} of it predicted, "
        f"{segments.max(axis=1).mean():.1f} documents a row"
    )
    seen = [kind for kind in KINDS if any(n and k.endswith(kind) for k, n in told.items())]
    caption = None if seen else "no document skipped, cut or with bytes that do not decode"
    table = Table("source", "documents", "tokens", "share", *seen, title=title, caption=caption)
    total = sum(n for key, n in told.items() if key.endswith("/tokens"))
    for name in sorted({key.rpartition("/")[0] for key in told}):
        tokens = told[f"{name}/tokens"]
        of_kind = [str(told[f"{name}/{kind}"]) for kind in seen]
        share = f"{tokens / total:.1%}"
        table.add_row(name, str(told[f"{name}/documents"]), str(tokens), share, *of_kind)
    return table


def _stage(cfg: JobConfig, name: str) -> Stage:
    """The stage of that name, or the first."""
    found = [stage for stage in resolve(cfg) if name in ("", stage.name)]
    if not found:
        known = ", ".join(stage.name for stage in cfg.stages) or "none"
        raise ConfigError(f"the job has no stage {name!r}; its stages: {known}")
    return found[0]


def main(argv: list[str]) -> None:
    """Command line of this module."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; a key is set by --config.KEY=VALUE")
    workdir = Path(flags.FLAGS.workdir or "")
    try:
        cfg = cli.job_config()
        # One process shows what all of them would read.
        cfg = dataclasses.replace(cfg, mesh={})
        limits = {"rows": _ROWS.value, "batches": _BATCHES.value, "tokens": _TOKENS.value}
        preview(cfg, workdir, Console(highlight=False), **limits, stage=_STAGE.value)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=cli.parse_flags)
