from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.tokenizer import (
    BytesTokenizer,
    JsonTokenizer,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)
from megatron_ext.errors import UserError
from tests.megatron_ext.data.corpora import small_bpe

TEXTS = st.text(st.characters(codec="utf-8"), max_size=80)


@given(TEXTS)
def test_every_text_comes_back(text: str) -> None:
    for tokenizer in (small_bpe(), BytesTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eod]) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", "</s>"])
def test_special_tokens_in_a_text_stay_text(text: str) -> None:
    ids = small_bpe().encode(text)
    assert small_bpe().eod not in ids
    assert small_bpe().decode(ids) == text


def test_batches_and_arrays_are_the_single_texts() -> None:
    texts = ["", "def f(x):\n    return x", "\u4e16\u754c 2024", "a" * 1000]
    for tokenizer in (small_bpe(), BytesTokenizer()):
        expected = [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch(texts) == expected
        arrays = tokenizer.encode_arrays(texts, np.uint16)
        assert [array.tolist() for array in arrays] == expected
        assert all(array.dtype == np.uint16 for array in arrays)


def test_training_is_deterministic_and_bounded() -> None:
    texts = ["the model reads the text", "the token is the model", ""]
    first, second = train_bpe(iter(texts), 300), train_bpe(iter(texts), 300)
    assert first.fingerprint == second.fingerprint
    assert 257 <= first.vocab_size <= 300
    assert len(first.encode("the model")) < len("the model")


def test_saved_tokenizers_come_back(tmp_path: Path) -> None:
    for name, tokenizer in (("bpe", small_bpe()), ("bytes", BytesTokenizer())):
        tokenizer.save(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert loaded.describe() == tokenizer.describe()
        assert loaded.encode("return 42") == tokenizer.encode("return 42")


def test_a_changed_vocabulary_is_noticed(tmp_path: Path) -> None:
    small_bpe().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["merges"].pop()
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="changed after it was saved"):
        load_tokenizer(tmp_path)


def _tree() -> dict[str, Any]:
    tree = json.loads(small_bpe()._canonical)
    assert isinstance(tree, dict)
    return tree


def test_truncation_padding_and_begin_tokens_are_turned_off(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    backend = tokenizers.Tokenizer.from_str(json.dumps(_tree()))
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "the model reads text and every token"
    assert open_tokenizer(tmp_path).encode(text) == small_bpe().encode(text)


@pytest.mark.parametrize("eod", ["</s>", "<|end_of_text|>", "<eos>"])
def test_the_end_of_document_token_is_found(eod: str) -> None:
    tree = _tree()
    text = json.dumps(tree).replace("<|endoftext|>", eod)
    tokenizer = JsonTokenizer(text)
    assert tokenizer.eod_token == eod
    assert tokenizer.eod == small_bpe().eod
    assert tokenizer.encode("text") == small_bpe().encode("text")


def test_an_unusual_end_of_document_token_must_be_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(_tree()).replace("<|endoftext|>", "<|stop|>"))
    with pytest.raises(UserError, match="--eod-token"):
        open_tokenizer(path)
    assert open_tokenizer(path, eod_token="<|stop|>").eod == small_bpe().eod
    with pytest.raises(UserError, match=r"near it are .*<\|stop\|>"):
        open_tokenizer(path, eod_token="<|stopp|>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[1, 2]", "no 'model'"),
        (b'{"model": {"type": "Nonsense"}}', "not a tokenizer.json that can be read"),
        (b"\xff\xfe", "cannot read the tokenizer"),
    ],
)
def test_a_bad_tokenizer_file_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_tokenizer(path)
    assert "mine.json" in str(error.value)


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no tokenizer at"):
        open_tokenizer(tmp_path / "none.json")
    with pytest.raises(UserError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path)


def test_large_vocabularies_need_int32() -> None:
    tree = _tree()
    tree["model"]["vocab"]["far away"] = 70_000
    tokenizer = JsonTokenizer(json.dumps(tree))
    assert tokenizer.vocab_size == 70_001
    assert tokenizer.dtype() == np.int32
    assert small_bpe().dtype() == np.uint16
