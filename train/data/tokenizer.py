"""A small byte-level BPE tokenizer trained on the job's own texts.

`python -m train.data.tokenizer OUT FILE...` trains one on text files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from mmjax.tokenizer import BOS, EOS, Tokenizer

SPECIAL = (BOS, EOS, "<think>", "</think>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, digits and their signs one by one, thinking marks as single tokens.

    Unlike M1's, merges may cross word borders, so that the fixed phrases of a small task become
    single tokens. A sign that merges with what stands before it would give one number two
    spellings, "=-" "3" after a sum and "-" "3" on its own, and make it hard to copy.

    Args:
      texts: What it is to encode.
      vocab_size: Most ids; the 256 bytes and the special tokens are always in.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]|-(?=[0-9])"), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
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


def _lines(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace")


def main(argv: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer.")
    parser.add_argument("out", type=Path, help="folder for tokenizer.json")
    parser.add_argument("files", type=Path, nargs="+", help="text files")
    parser.add_argument("--vocab-size", type=int, default=32768)
    args = parser.parse_args(argv)
    tokenizer = train_tokenizer(_lines(args.files), args.vocab_size)
    tokenizer.save(args.out)
    print(f"{tokenizer.vocab_size} ids to {args.out / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
