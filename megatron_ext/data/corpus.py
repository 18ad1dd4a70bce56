"""A prepared corpus: what training reads."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.data.indexed import TokenFile
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.data.workplace import (
    FORMAT_VERSION,
    METADATA_FILE,
    SPLITS,
    TOKENIZER_FOLDER,
    WORK_FOLDER,
)
from megatron_ext.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """A folder that `data prepare` made.

    Args:
        path: the folder.
        metadata: the content of metadata.json.
        tokenizer: made the ids.
        train: what is trained on.
        validation: what is held out; it may have no documents.
    """

    path: Path
    metadata: dict[str, Any]
    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile

    @property
    def fingerprint(self) -> str:
        """Equal for two corpora that hold the same ids in the same order."""
        return str(self.metadata["fingerprint"])

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Open a corpus; the ids are mapped, not read.

        Raises:
            UserError: there is no corpus, it is unfinished, or a file is missing or damaged.
        """
        path = Path(path)
        metadata = _read_metadata(path)
        tokenizer = load_tokenizer(path / TOKENIZER_FOLDER)
        saved = metadata["tokenizer"]["fingerprint"]
        if tokenizer.fingerprint != saved:
            raise UserError(
                f"{path / TOKENIZER_FOLDER} holds another tokenizer ({tokenizer.fingerprint}) "
                f"than the one that made the ids ({saved}). Restore it"
            )
        train, validation = (_open_split(path, split, metadata) for split in SPLITS)
        return cls(path, metadata, tokenizer, train, validation)


def _open_split(path: Path, split: str, metadata: dict[str, Any]) -> TokenFile:
    tokens = TokenFile(path / split)
    expected = metadata["splits"][split]
    for name in ("num_documents", "num_tokens"):
        found = getattr(tokens, name)
        if found != expected[name]:
            raise UserError(
                f"{path / split}.idx: expected {expected[name]} for {name} as {METADATA_FILE} "
                f"says, found {found}. Restore the file, or prepare the corpus again"
            )
    return tokens


def _read_metadata(path: Path) -> dict[str, Any]:
    file = path / METADATA_FILE
    if not file.is_file():
        raise UserError(_why_not_a_corpus(path))
    try:
        metadata = json.loads(file.read_text(encoding="ascii"))
        version = metadata["format_version"]
        _ = metadata["fingerprint"], metadata["tokenizer"]["fingerprint"]
        _ = [metadata["splits"][split][name] for split in SPLITS for name in _SPLIT_KEYS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}). Prepare the corpus again") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format version {version}, this program reads {FORMAT_VERSION}. Prepare the "
            "corpus again, or install the version that made it"
        )
    if not isinstance(metadata, dict):
        raise UserError(f"{file} is damaged. Prepare the corpus again")
    return metadata


_SPLIT_KEYS = ("num_documents", "num_tokens", "num_bytes")


def _why_not_a_corpus(path: Path) -> str:
    if not path.exists():
        return (
            f"{path}: no such folder. Make a corpus with: megatron-ext data prepare --input PATH "
            f"--output {path}"
        )
    if not path.is_dir():
        return f"{path} is a file, expected the folder of a prepared corpus"
    if (path / WORK_FOLDER).is_dir():
        return (
            f"{path}: its preparation was not finished. Run the same `megatron-ext data prepare` "
            "command again: it goes on where it was"
        )
    found = ", ".join(sorted(os.listdir(path))[:5]) or "nothing"
    return f"{path} is not a prepared corpus: no {METADATA_FILE} in it (it holds {found})"
