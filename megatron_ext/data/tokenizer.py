"""Text to token ids and back, with one known end-of-document token.

Two kinds. `bytes` needs no file: ids 0..255 are the bytes of the UTF-8 text and 256 ends a
document. `json` is a Hugging Face `tokenizer.json`, given by the user or trained here as
byte-level BPE with Llama 3's word pattern, so that every text comes back unchanged.

What stands in a text is text: the characters `<|endoftext|>` inside a document never become the
token that ends documents, or a web page about tokenizers could cut itself in two. Truncation,
padding and automatic begin tokens that a `tokenizer.json` may ask for are turned off, because
they would drop or add tokens silently.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_ext.data.disk import write_json, write_text
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
METADATA_FILE = "tokenizer_metadata.json"
TRAINED_EOD = "<|endoftext|>"
EOD_TOKENS = (
    TRAINED_EOD,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|endofdoc|>",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
# Llama 3's pattern: contractions, words, up to three digits, punctuation, line ends, spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.int32]


class Tokenizer(ABC):
    """What the rest of the program knows about a tokenizer.

    Attributes:
        kind: `bytes` or `json`.
        vocab_size: number of ids, the end-of-document token included; every id is below it.
        eod: id of the token that ends a document.
        eod_token: that token as text.
        fingerprint: hexadecimal digest of all that decides how a text is encoded.
    """

    kind: str
    vocab_size: int
    eod: int
    eod_token: str
    fingerprint: str

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[npt.NDArray[Any]]:
        """Ids of each text as an array of `dtype`, without the end-of-document token."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; end-of-document and other special tokens are left out."""

    @abstractmethod
    def _save_vocabulary(self, folder: Path) -> None: ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without the end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts in one call."""
        return [array.tolist() for array in self.encode_arrays(texts, np.int32)]

    def dtype(self) -> npt.DTypeLike:
        """The type in which megatron stores such a vocabulary (its `DType.optimal_dtype`)."""
        return np.uint16 if self.vocab_size < 65500 else np.int32

    def describe(self) -> dict[str, Any]:
        """What a file that names this tokenizer writes down."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "eod_token": self.eod_token,
            "fingerprint": self.fingerprint,
        }

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder, from which `load_tokenizer` reads it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_vocabulary(folder)
        write_json(folder / METADATA_FILE, self.describe())


class BytesTokenizer(Tokenizer):
    """One id a byte: no vocabulary, nothing to train."""

    kind = "bytes"
    vocab_size = 257
    eod = 256
    eod_token = TRAINED_EOD
    fingerprint = hashlib.blake2b(b"bytes 257", digest_size=16).hexdigest()

    def encode_arrays(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[npt.NDArray[Any]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(dtype) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def _save_vocabulary(self, folder: Path) -> None:
        (folder / TOKENIZER_FILE).unlink(missing_ok=True)


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`.

    Args:
        text: what the file holds.
        eod_token: the token that ends a document; searched among the usual names if not given.
        source: the file's name for messages.
    """

    kind = "json"

    def __init__(
        self, text: str, *, eod_token: str | None = None, source: str = TOKENIZER_FILE
    ) -> None:
        self._canonical = _canonical_json(text, source)
        self._backend = _open_backend(self._canonical, source)
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.eod_token = _find_eod(vocabulary, eod_token, source)
        self.eod = vocabulary[self.eod_token]
        self.vocab_size = max(vocabulary.values()) + 1
        digest = hashlib.blake2b(self._canonical.encode(), digest_size=16)
        digest.update(str(self.eod).encode())
        self.fingerprint = digest.hexdigest()

    def encode_arrays(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[npt.NDArray[Any]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def _save_vocabulary(self, folder: Path) -> None:
        write_text(folder / TOKENIZER_FILE, self._canonical)


def _canonical_json(text: str, source: str) -> str:
    """The same tokenizer without truncation and padding, in one spelling for the fingerprint."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source} is not a tokenizer.json: not JSON ({error})") from None
    if not isinstance(tree, dict) or "model" not in tree:
        raise UserError(
            f"{source} is not a tokenizer.json: it has no 'model'. Expected is the file that the "
            "Hugging Face `tokenizers` library writes; SentencePiece and tiktoken files must be "
            "converted first"
        )
    tree["truncation"] = None
    tree["padding"] = None
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


def _open_backend(text: str, source: str) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{source} is not a tokenizer.json that can be read: {error}") from None
    backend.encode_special_tokens = True  # "<|endoftext|>" in a text stays text
    return backend


def _find_eod(vocabulary: dict[str, int], wanted: str | None, source: str) -> str:
    if wanted is not None:
        if wanted in vocabulary:
            return wanted
        near = get_close_matches(wanted, vocabulary, n=3)
        hint = f"; near it are {', '.join(map(repr, near))}" if near else ""
        raise UserError(f"--eod-token {wanted!r} is not in the vocabulary of {source}{hint}")
    for token in EOD_TOKENS:
        if token in vocabulary:
            return token
    raise UserError(
        f"{source} has none of the usual end-of-document tokens "
        f"({', '.join(map(ascii, EOD_TOKENS))}). Name the one it has with --eod-token TOKEN"
    )


def open_tokenizer(source: str | Path, *, eod_token: str | None = None) -> Tokenizer:
    """`bytes`, a `tokenizer.json`, or a folder with one, such as a corpus's or checkpoint's own.

    Raises:
        UserError: no such file, not a tokenizer, or no end-of-document token.
    """
    if str(source) == "bytes":
        return BytesTokenizer()
    path = Path(source)
    if path.is_dir():
        if eod_token is None and (path / METADATA_FILE).is_file():
            return load_tokenizer(path)
        path = path / TOKENIZER_FILE
    return JsonTokenizer(_read_text(path), eod_token=eod_token, source=str(path))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote.

    Raises:
        UserError: a file is missing, or does not fit the fingerprint it was saved with.
    """
    path = Path(folder) / METADATA_FILE
    try:
        saved = json.loads(_read_text(path))
        kind, fingerprint = saved["kind"], saved["fingerprint"]
        eod_token = saved["eod_token"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a tokenizer's metadata: {error!r}") from None
    source = "bytes" if kind == "bytes" else Path(folder) / TOKENIZER_FILE
    tokenizer = open_tokenizer(source, eod_token=eod_token)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{Path(folder) / TOKENIZER_FILE} was changed after it was saved: its fingerprint is "
            f"{tokenizer.fingerprint}, {METADATA_FILE} says {fingerprint}. Restore the file"
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE. The same texts give the same tokenizer on any number of threads.

    Args:
        texts: the sample, as many texts as wanted.
        vocab_size: ids to make, 256 bytes and the end-of-document token included; a small
            sample may give fewer.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if vocab_size < 257:
        raise UserError(
            f"a trained tokenizer of {vocab_size} ids is impossible: 256 bytes and "
            f"{TRAINED_EOD} need 257"
        )
    backend = Backend(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[TRAINED_EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_non_empty(texts), trainer)
    return JsonTokenizer(backend.to_str())


def _non_empty(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no tokenizer at {os.fspath(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer {os.fspath(path)}: {error}") from None
