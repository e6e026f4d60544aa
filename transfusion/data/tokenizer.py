"""Byte-level BPE: every text has tokens, and `decode(encode(text)) == text`."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfusion.data.sources import is_unicode
from transfusion.files import write_whole
from transfusion.optional import require
from transfusion.sequence import SpecialTokens

_SPECIAL = SpecialTokens()
_SPECIAL_NAMES = [f"<{field.name}>" for field in fields(_SPECIAL)]


class Tokenizer:
    """Text <-> token ids, with the ids of `SpecialTokens()` in front of the vocabulary.

    Text is only ever text: "<eos>" in a document is encoded as five characters, never as the special token.
    """

    special = _SPECIAL

    def __init__(self, backend: Any) -> None:
        ids = tuple(backend.token_to_id(name) for name in _SPECIAL_NAMES)
        if ids != astuple(_SPECIAL):
            raise ValueError(f"the tokenizer gives {_SPECIAL_NAMES} the ids {ids}, expected {astuple(_SPECIAL)}")
        backend.encode_special_tokens = True
        self._backend = backend

    def __reduce__(self) -> tuple[Any, ...]:
        """Its JSON, read as a file is: a backend that is pickled by itself takes "<eos>" in a text for the token."""
        return _from_json, (self._backend.to_str(),)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """The BPE of `texts` with at most `vocab_size` tokens; the same texts give the same tokenizer."""
        tokenizers = require("tokenizers")
        smallest = 256 + len(_SPECIAL_NAMES)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size={vocab_size} cannot hold 256 bytes and the special tokens; use >= {smallest}")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=_SPECIAL_NAMES,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            min_frequency=2,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer in the JSON file `path`. Raises `ValueError` for a truncated or foreign file."""
        content = Path(path).read_bytes()
        try:
            text = content.decode("utf-8")
            json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is truncated or no JSON: {error}") from error
        try:
            return cls(require("tokenizers").Tokenizer.from_str(text))
        except ImportError:
            raise
        except Exception as error:  # the library raises bare Exception for JSON that is no tokenizer
            raise ValueError(f"{path} is not a tokenizer written by Tokenizer.save: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes one JSON file; a failed write leaves the one that was there."""
        write_whole(Path(path), self._backend.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._backend.get_vocab_size())

    def encode(self, text: str) -> Tensor:
        """-> (n,) int64, without BOS or EOS. Raises `ValueError` for what is no Unicode: half of a surrogate pair."""
        if not is_unicode(text):
            raise ValueError(f"the text {text!r} is no valid Unicode: half of a surrogate pair is in it")
        return torch.tensor(self._backend.encode(text).ids, dtype=torch.int64, device="cpu")

    def decode(self, token_ids: Tensor | Sequence[int]) -> str:
        """-> the text; special tokens say nothing."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        return str(self._backend.decode(ids, skip_special_tokens=True))


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(require("tokenizers").Tokenizer.from_str(text))
