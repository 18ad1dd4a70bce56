"""Small corpora for tests: text to prepare, and ways to read back what was made of it."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

from megatron_ext.data.corpus import Corpus
from megatron_ext.data.indexed import TokenFile
from megatron_ext.data.prepare import PrepareReport, PrepareSettings, prepare
from megatron_ext.data.tokenizer import JsonTokenizer, train_bpe

_WORDS = [
    *("the", "model", "reads", "text", "and", "every", "token", "def", "return", "self", "don't"),
    *("0", "42", "1999", "x", "=", "(", ")", ":", ",", ".", "\u00e9t\u00e9", "\u4e16\u754c"),
]


def make_text(seed: int, num_words: int) -> str:
    """Text with lines, blank lines and indentation."""
    draw = random.Random(seed)
    return "".join(
        draw.choice(_WORDS) + draw.choice((" ", " ", " ", " ", "\n", "\n    ", "\n\n"))
        for _ in range(num_words)
    )


@functools.cache
def small_bpe() -> JsonTokenizer:
    """A trained tokenizer of 400 ids."""
    tokenizer = train_bpe((make_text(seed, 400) for seed in range(20)), 400)
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer


def prepare_quietly(output: Path, *inputs: str | Path, **changes: Any) -> PrepareReport:
    """Prepare without progress; bytes and two workers unless told."""
    options: dict[str, Any] = {"tokenizer": "bytes", "num_workers": 2, **changes}
    names = tuple(str(name) for name in inputs)
    settings = PrepareSettings(inputs=names, output=output, **options)
    return prepare(settings, show_progress=False)


def split_texts(output: Path) -> tuple[list[str], list[str]]:
    """The texts to train on, in their order, and those held out."""
    corpus = Corpus.open(output)

    def decode(tokens: TokenFile) -> list[str]:
        return [corpus.tokenizer.decode(ids.tolist()) for ids in tokens.documents()]

    return decode(corpus.train), decode(corpus.validation)


def folder_bytes(path: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}
