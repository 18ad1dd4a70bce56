"""Everything that decides what `data prepare` makes, and what only decides how fast."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.errors import UserError

# A unit is never smaller: a document's split is decided by its first 64 KiB (split.py), and two
# cuts of one file must not meet (cut.py).
MIN_UNIT_BYTES = 128 * 1024
MAX_DEFAULT_UNIT_BYTES = 256 * 1024**2
MIN_DEFAULT_UNIT_BYTES = 2 * 1024**2
SAMPLE_BYTES_PER_TOKEN = 2048
MIN_TRAINED_VOCAB_SIZE = 257


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """Settings of one preparation.

    Args:
        inputs: files, folders, or `python-stdlib`.
        output: the folder to make.
        tokenizer: a `tokenizer.json` (or its folder), `bytes`, or `train:N` for BPE of N ids.
        include: globs; in folders only files that match one are read.
        text_key: key in .jsonl and column in .parquet that holds the text.
        validation_fraction: share of documents held out, 0 <= fraction < 1.
        bad_records: `stop` or `skip` at what cannot be read as text.
        num_workers: processes; all cores if not given.
        eod_token: the given tokenizer's end-of-document token, if its name is unusual.
        training_sample_bytes: text to train BPE on; 2 KiB per id (at least 8 MiB) if not given.
        unit_bytes: input handled between two restart points; by the input's size if not given.
        max_record_bytes: a longer line of .jsonl is a bad record.
        overwrite: throw away what another preparation left in `output`.
    """

    inputs: tuple[str, ...]
    output: Path
    tokenizer: str = "train:8192"
    include: tuple[str, ...] = ()
    text_key: str = "text"
    validation_fraction: float = 0.01
    bad_records: Literal["stop", "skip"] = "stop"
    num_workers: int | None = None
    eod_token: str | None = None
    training_sample_bytes: int | None = None
    unit_bytes: int | None = None
    max_record_bytes: int = 64 * 1024**2
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UserError("no input: name files, folders or python-stdlib with --input")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"--validation-fraction {self.validation_fraction}: expected 0 <= fraction < 1"
            )
        if self.bad_records not in ("stop", "skip"):
            raise UserError(f"--bad-records {self.bad_records!r}: expected stop or skip")
        if self.unit_bytes is not None and self.unit_bytes < MIN_UNIT_BYTES:
            raise UserError(f"--unit-bytes {self.unit_bytes}: expected at least {MIN_UNIT_BYTES}")
        for name in ("num_workers", "training_sample_bytes", "max_record_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        _ = self.trained_vocab_size

    @property
    def trained_vocab_size(self) -> int | None:
        """N of `train:N`, None for a tokenizer that is not trained here."""
        if not self.tokenizer.startswith("train"):
            return None
        match = re.fullmatch(r"train:(\d{1,9})", self.tokenizer)
        if match is None:
            if os.path.exists(self.tokenizer):
                return None
            raise UserError(f"--tokenizer {self.tokenizer!r}: expected train:N, such as train:8192")
        vocab_size = int(match[1])
        if vocab_size < MIN_TRAINED_VOCAB_SIZE:
            raise UserError(
                f"--tokenizer {self.tokenizer}: 256 bytes and the end-of-document token need at "
                f"least train:{MIN_TRAINED_VOCAB_SIZE}"
            )
        return vocab_size

    def training_name(self) -> str:
        """What decides a trained tokenizer, besides the text."""
        vocab_size = self.trained_vocab_size
        assert vocab_size is not None
        return f"train:{vocab_size} on {self.sample_bytes(vocab_size)} bytes"

    def sample_bytes(self, vocab_size: int) -> int:
        """Bytes of text to train a tokenizer of `vocab_size` ids on."""
        if self.training_sample_bytes is not None:
            return self.training_sample_bytes
        return max(8 * 1024**2, SAMPLE_BYTES_PER_TOKEN * vocab_size)

    def unit_size(self, total_bytes: int) -> int:
        """Bytes per unit: about 4096 units for a large input, none below 2 or above 256 MiB."""
        if self.unit_bytes is not None:
            return self.unit_bytes
        return min(max(total_bytes // 4096, MIN_DEFAULT_UNIT_BYTES), MAX_DEFAULT_UNIT_BYTES)

    def worker_count(self) -> int:
        """Processes to start: the cores that this process may use, unless told."""
        return self.num_workers or len(os.sched_getaffinity(0))
