"""A small byte-level BPE tokenizer trained on the job's own texts.

`python -m train.data.tokenizer OUT PATH...` trains one on files of any format that jobs read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from mmjax.config import ConfigError
from mmjax.tokenizer import BOS, EOS, Tokenizer
from train.config import FORMATS, DataConfig, SourceConfig

SPECIAL = (BOS, EOS, "<think>", "</think>")
# Letters with one sign or space before them, digits one by one, other signs, breaks, spaces.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNED_DIGITS = "[0-9]|-(?=[0-9])"


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, words: bool = False) -> Tokenizer:
    """Byte-level BPE, digits one by one, thinking marks as single tokens.

    Without `words` merges may cross word borders, so that the fixed phrases of a small task become
    single tokens, and a sign is split off the digit after it: if it merged with what stands before
    it, one number would have two spellings, "=-" "3" after a sum and "-" "3" on its own, and be
    hard to copy.

    Args:
      texts: What it is to encode.
      vocab_size: Most ids; the 256 bytes and the special tokens are always in.
      words: Whether no merge crosses the border of a word, as a corpus of any size needs.
    """
    border = Regex(_WORDS if words else _SIGNED_DIGITS)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(border, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def main(argv: list[str] | None = None) -> int:
    """Command line of this module."""
    from train.data.pipeline import sample_texts

    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer.")
    parser.add_argument("out", type=Path, help="folder for tokenizer.json")
    parser.add_argument("paths", nargs="*", help="files, folders of save_to_disk, or patterns")
    parser.add_argument("--format", choices=FORMATS, default="", help="by suffix unless given")
    parser.add_argument("--kind", choices=("text", "chat"), default="text")
    parser.add_argument("--field", default="", help="of a row; text or messages unless given")
    parser.add_argument("--vocab-size", type=int, default=32768)
    args = parser.parse_args(argv)
    if bool(args.paths) == (args.format == "stdlib"):
        parser.error("name the files to train on, or --format stdlib and no file")
    source = SourceConfig("files", tuple(args.paths), args.format, 1.0, args.kind, args.field)
    try:
        texts = sample_texts(DataConfig(mixture=(source,)))
        tokenizer = train_tokenizer(texts, args.vocab_size, words=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokenizer.save(args.out)
    print(f"{tokenizer.vocab_size} ids to {args.out / 'tokenizer.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
