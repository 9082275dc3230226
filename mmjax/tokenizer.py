"""Text to ids and back: a thin coat over a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import SupportsInt

import tokenizers
from tokenizers import decoders

BOS = "<beginning_of_sentence>"
EOS = "<end_of_sentence>"
_DOCUMENT_START = "<begin_of_document>"


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or lacks a token that the models need."""


class Tokenizer:
    """A byte-level BPE or any other `tokenizers` model with MiniMax's turn markers.

    Args:
      backend: The parsed tokenizer. Truncation and padding, which its file may ask for, are taken
        off: they would cut documents and fill prompts.
      eos: The token that ends a turn; generation stops there.

    Raises:
      TokenizerError: the vocabulary has no such token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str = EOS) -> None:
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        found = backend.token_to_id(eos)
        if found is None:
            raise TokenizerError(f"the tokenizer has no token {eos!r}, which ends a turn")
        self.eos_id = int(found)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` (and `eos_token` of tokenizer_config.json) of a model folder.

        Raises:
          TokenizerError: the file is missing or broken.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise TokenizerError(f"{file} does not exist; copy the model's tokenizer.json there")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} is not a tokenizer: {error}") from None
        return cls(backend, _eos_token(folder))

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and the little of tokenizer_config.json that is needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        eos = self.backend.id_to_token(self.eos_id)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": BOS}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included; some below may be of no token."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def document_start(self) -> str:
        """What a prompt starts with: M1's `<begin_of_document>`, where the vocabulary has it."""
        known = self.backend.token_to_id(_DOCUMENT_START) is not None
        return _DOCUMENT_START if known else ""

    def check_turns(self) -> None:
        """Checks that the marks of the chat template are tokens and that its turns end as replies.

        Raises:
          TokenizerError: it is of another family of models.
        """
        tokens = {mark: self.backend.token_to_id(mark) for mark in (BOS, EOS)}
        missing = [mark for mark, token in tokens.items() if self.encode(mark) != [token]]
        end = self.backend.id_to_token(self.eos_id)
        if not missing and end == EOS:
            return
        why = f"has no token {' and no '.join(missing)}" if missing else f"ends replies with {end}"
        raise TokenizerError(
            f"the tokenizer {why}; chats are written in the template of MiniMax-M1, with {BOS} and "
            f"{EOS} around turns: take a tokenizer of its family, or add the two as special tokens "
            f"and name {EOS} as eos_token in tokenizer_config.json"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens in it become their ids, none is added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[SupportsInt], *, skip_special_tokens: bool = False) -> str:
        """Text of the ids."""
        return str(
            self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        )

    def token_bytes(self, token: SupportsInt) -> bytes:
        """What one id stands for; with byte-level BPE that may be half a character.

        An id beyond the vocabulary stands for nothing.
        """
        text = self.backend.id_to_token(int(token))
        if text is None:
            return b""
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return self.decode([token]).encode()
        try:
            return bytes(_BYTES[character] for character in text)
        except KeyError:  # an added token is written as it is
            return text.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary, which has no control characters.

    Source: GPT-2's `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + n): byte for n, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTES = _byte_level_alphabet()


def _eos_token(folder: Path) -> str:
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return EOS
    token = json.loads(file.read_text()).get("eos_token") or EOS
    return str(token["content"] if isinstance(token, dict) else token)
