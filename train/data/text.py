"""Documents from text and JSONL files."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmjax.config import ConfigError


def read_documents(patterns: Sequence[str]) -> list[str]:
    """All documents of the files that the patterns match, in sorted order.

    A .jsonl file holds one {"text": ...} a line; any other file is one document.

    Raises:
      ConfigError: a pattern matches nothing, a line is no such object, or all files are empty.
    """
    documents: list[str] = []
    for pattern in patterns:
        files = sorted(f for f in glob.glob(pattern, recursive=True) if Path(f).is_file())
        if not files:
            raise ConfigError(f"data.paths: {pattern!r} matches no file")
        for file in files:
            documents.extend(_documents_of(Path(file)))
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise ConfigError(f"data.paths: no text in the files of {', '.join(map(repr, patterns))}")
    return documents


def _documents_of(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix != ".jsonl":
        yield text
        return
    # Not splitlines: JSON strings may hold U+2028 and other characters that it breaks at.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{file}:{number} is no JSON object with a "text": {error!r}'
            ) from None
        if not isinstance(document, str):
            raise ConfigError(f'{file}:{number}: "text" is {document!r}, expected a string')
        yield document
