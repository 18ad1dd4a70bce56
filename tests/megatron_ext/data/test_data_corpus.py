from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ext.data.corpus import Corpus
from megatron_ext.errors import UserError
from tests.megatron_ext.data.corpora import make_text, prepare_quietly


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(make_text(i, 40))
    prepare_quietly(tmp_path / "corpus", tmp_path, tokenizer="train:300", validation_fraction=0.2)
    return tmp_path / "corpus"


def test_a_corpus_opens(corpus: Path) -> None:
    opened = Corpus.open(str(corpus))
    assert opened.metadata["splits"]["train"]["num_tokens"] == opened.train.num_tokens
    assert opened.train.num_documents + opened.validation.num_documents == 30
    assert opened.tokenizer.vocab_size == opened.metadata["tokenizer"]["vocab_size"]
    ids = opened.train.read(0)
    assert int(ids[-1]) == opened.tokenizer.eod
    assert opened.train.document_bytes[0] == len(opened.tokenizer.decode(ids.tolist()).encode())


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda corpus: os.truncate(corpus / name, (corpus / name).stat().st_size - 3)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda corpus: (corpus / name).unlink()


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(corpus: Path) -> None:
        path = corpus / "metadata.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _other_split(corpus: Path) -> None:
    for suffix in (".bin", ".idx", ".documents.npy"):
        os.replace(corpus / f"validation{suffix}", corpus / f"train{suffix}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate("train.idx"), r"train\.idx: expected \d+ bytes .* found \d+ bytes"),
        (_truncate("validation.bin"), r"validation\.bin: expected \d+ bytes"),
        (_remove("train.documents.npy"), r"train\.documents\.npy is missing"),
        (_remove("tokenizer/tokenizer.json"), "there is no tokenizer at"),
        (_truncate("metadata.json"), r"metadata\.json is damaged"),
        (_remove("metadata.json"), r"not a prepared corpus: no metadata\.json in it"),
        (_edit(format_version=99), "format version 99, this program reads 1"),
        (_edit(splits={}), r"metadata\.json is damaged"),
        (_edit(tokenizer={"fingerprint": "0"}), "holds another tokenizer"),
        (_other_split, r"train\.idx: expected \d+ for num_documents"),
    ],
)
def test_damage_is_named(corpus: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(corpus)
    with pytest.raises(UserError, match=message) as error:
        Corpus.open(corpus)
    assert str(corpus) in str(error.value)


def test_what_is_no_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder.*data prepare --input"):
        Corpus.open(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, expected the folder"):
        Corpus.open(tmp_path / "file")
    (tmp_path / "half" / ".prepare").mkdir(parents=True)
    with pytest.raises(UserError, match="preparation was not finished"):
        Corpus.open(tmp_path / "half")
