from __future__ import annotations

import gzip
import json
import random
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ext.data import indexed, merge
from megatron_ext.data.corpus import Corpus
from megatron_ext.data.split import split_hash
from megatron_ext.errors import UserError
from tests.megatron_ext.data.corpora import (
    folder_bytes,
    make_text,
    prepare_quietly,
    small_bpe,
    split_texts,
)

UNIT = 128 * 1024


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def mixed_inputs(root: Path) -> tuple[list[Path], list[str]]:
    """Every format, with documents of all sizes; the inputs, and their texts in input order."""
    texts = [make_text(seed, 20 + 40 * seed) for seed in range(60)]
    tree = root / "tree"
    (tree / "sub").mkdir(parents=True)
    for i in range(10):
        (tree / "sub" / f"{i}.txt").write_text(texts[i])
    (tree / "z-large.txt").write_text(make_text(100, 50_000))
    jsonl = write_jsonl(root / "a.jsonl", [*texts[10:20], make_text(101, 130_000), *texts[20:30]])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[30:40]).encode()
    (root / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[40:50]).encode()
    (root / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    table = pyarrow.table({"text": texts[50:]})
    pyarrow.parquet.write_table(table, root / "d.parquet", row_group_size=3)
    expected = [
        *texts[:10], make_text(100, 50_000), *texts[10:20], make_text(101, 130_000), *texts[20:]
    ]  # fmt: skip
    names = ("b.jsonl.gz", "c.jsonl.zst", "d.parquet")
    return [tree, jsonl, *(root / name for name in names)], expected


@pytest.mark.parametrize("tokenizer", ["bytes", "train:500", "file"])
def test_all_formats_give_their_texts_whatever_the_workers(tmp_path: Path, tokenizer: str) -> None:
    inputs, expected = mixed_inputs(tmp_path)
    if tokenizer == "file":
        small_bpe().save(tmp_path / "mine")
        tokenizer = str(tmp_path / "mine" / "tokenizer.json")
    outputs = []
    for num_workers in (1, 3):
        output = tmp_path / f"corpus{num_workers}"
        report = prepare_quietly(
            output, *inputs, tokenizer=tokenizer, num_workers=num_workers,
            unit_bytes=UNIT, validation_fraction=0.2,
        )  # fmt: skip
        outputs.append(folder_bytes(output))
    assert outputs[0] == outputs[1]
    train, validation = split_texts(output)
    threshold = int(0.2 * 2**64)
    assert train == [text for text in expected if split_hash(text) >= threshold]
    assert validation == [text for text in expected if split_hash(text) < threshold]
    assert report.train.num_documents == len(train) > 0
    assert report.validation.num_documents == len(validation) > 0
    assert report.train.num_bytes == sum(len(text.encode()) for text in train)
    assert not report.already_prepared
    assert not (output / ".prepare").exists()


def test_long_documents_have_the_tokens_of_the_whole(tmp_path: Path) -> None:
    """Cut into units and blocks, and yet what encoding the text at once gives."""
    text = "\n".join(make_text(seed, 30).replace("\n", " ") for seed in range(6000))
    (tmp_path / "long.txt").write_text(text)
    write_jsonl(tmp_path / "long.jsonl", [text])
    small_bpe().save(tmp_path / "mine")
    for name in ("long.txt", "long.jsonl"):
        output = tmp_path / f"corpus-{name}"
        prepare_quietly(output, tmp_path / name, tokenizer=str(tmp_path / "mine"), unit_bytes=UNIT)
        corpus = Corpus.open(output)
        assert corpus.train.num_documents == 1
        expected = [*small_bpe().encode(text), small_bpe().eod]
        assert corpus.train.read(0).tolist() == expected
        assert corpus.train.document_bytes.tolist() == [len(text.encode())]


def test_a_second_call_finds_the_corpus(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [make_text(i, 30) for i in range(20)])
    first = prepare_quietly(tmp_path / "corpus", tmp_path / "a.jsonl")
    before = folder_bytes(tmp_path / "corpus")
    second = prepare_quietly(tmp_path / "corpus", tmp_path / "a.jsonl", num_workers=1)
    assert second.already_prepared
    assert second.train == first.train
    assert second.notes == first.notes
    assert folder_bytes(tmp_path / "corpus") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "train:300"}, "with tokenizer = "),
        ({"validation_fraction": 0.5}, "with validation_fraction = 0.01 instead of 0.5"),
        ({"text_key": "body"}, "with text_key = 'text' instead of 'body'"),
    ],
)
def test_other_settings_are_refused_unless_overwritten(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    texts = [make_text(i, 30) for i in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t, "body": t + "!"}) + "\n" for t in texts))
    prepare_quietly(tmp_path / "corpus", path)
    before = folder_bytes(tmp_path / "corpus")
    with pytest.raises(UserError, match=message) as error:
        prepare_quietly(tmp_path / "corpus", path, **changes)
    assert "--overwrite" in str(error.value)
    assert folder_bytes(tmp_path / "corpus") == before
    prepare_quietly(tmp_path / "corpus", path, **changes, overwrite=True)
    fresh = tmp_path / "fresh"
    prepare_quietly(fresh, path, **changes)
    assert folder_bytes(tmp_path / "corpus") == folder_bytes(fresh)


def test_changed_inputs_are_refused_unless_overwritten(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    prepare_quietly(tmp_path / "corpus", tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three", "four"])
    with pytest.raises(UserError, match="other input files: 1 of 50 bytes then, 1 of 67 bytes now"):
        prepare_quietly(tmp_path / "corpus", tmp_path / "a.jsonl")
    prepare_quietly(tmp_path / "corpus", tmp_path / "a.jsonl", overwrite=True)
    train, validation = split_texts(tmp_path / "corpus")
    assert sorted(train + validation) == ["four", "one", "three", "two"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not empty and holds no prepared corpus"):
            prepare_quietly(tmp_path / "home", tmp_path / "a.txt", overwrite=overwrite)
    assert folder_bytes(tmp_path / "home") == {"thesis.tex": b"years of work"}
    with pytest.raises(UserError, match=r"--output .*a\.txt"):
        prepare_quietly(tmp_path / "a.txt", tmp_path / "home")


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path) -> None:
    texts = [make_text(i, 10) for i in range(100)]
    copies = texts * 3
    random.Random(0).shuffle(copies)
    write_jsonl(tmp_path / "a.jsonl", copies)
    prepare_quietly(tmp_path / "corpus", tmp_path / "a.jsonl", validation_fraction=0.3)
    train, validation = split_texts(tmp_path / "corpus")
    assert len(train) + len(validation) == 300
    assert len(validation) > 30
    assert not set(train) & set(validation)


def test_a_tiny_corpus_holds_out_one_document_and_says_so(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(8)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    report = prepare_quietly(tmp_path / "corpus", tmp_path / "a.jsonl", tokenizer="train:300")
    train, validation = split_texts(tmp_path / "corpus")
    assert validation == [min(texts, key=split_hash)]
    assert train == [text for text in texts if text not in validation]
    assert "the one with the smallest hash is held out" in report.notes[0]


def test_a_single_document_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(make_text(0, 500))
    report = prepare_quietly(tmp_path / "corpus", tmp_path / "a.txt", tokenizer="train:5000")
    assert report.train.num_documents == 1
    assert report.validation.num_documents == 0
    assert "single document" in report.notes[0]
    assert "fewer than the 5000 asked for" in report.notes[1]
    assert Corpus.open(tmp_path / "corpus").validation.num_tokens == 0


def test_the_tokenizer_never_sees_what_is_held_out(tmp_path: Path) -> None:
    """Each document has a word of its own, and would get a token for it."""
    texts = [f"{chr(0x4E00 + i)} " * 400 for i in range(40)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    for fraction in (0.3, 1e-9):
        output = tmp_path / f"corpus{fraction}"
        prepare_quietly(
            output, tmp_path / "a.jsonl", tokenizer="train:2000", validation_fraction=fraction
        )
        tokenizer = Corpus.open(output).tokenizer
        train, validation = split_texts(output)
        assert validation
        assert all(len(tokenizer.encode(text[0])) == 1 for text in train)
        assert all(len(tokenizer.encode(text[0])) > 1 for text in validation)


def bad_corpus(tmp_path: Path) -> Path:
    """Bad records over many units of two files, and in a text of several units."""
    folder = tmp_path / "bad"
    folder.mkdir()
    lines = [json.dumps({"text": make_text(i, 120)}) for i in range(800)]
    for i in (3, 400, 401, 799):
        lines[i] = '{"text": 5}'
    (folder / "a.jsonl").write_text("\n".join(lines))
    text = bytearray(("a line of text\n" * 40_000).encode())
    text[15 * 30_000 + 3] = 0xFF
    text[15 * 38_000 + 3] = 0xFF
    (folder / "b.txt").write_bytes(text)
    (folder / "c.txt").write_bytes(b"GIF89a\0\1\2")
    (folder / "d.txt").touch()
    (folder / "e-large.bin").write_bytes(b"\0" * 400_000)
    (folder / "f.txt").write_text("good")
    return folder


def test_bad_records_are_skipped_and_counted_when_asked(tmp_path: Path) -> None:
    folder = bad_corpus(tmp_path)
    report = prepare_quietly(
        tmp_path / "corpus", folder, bad_records="skip", unit_bytes=UNIT, validation_fraction=0.0
    )
    assert report.counts == {"bad_records": 5, "empty_documents": 1, "binary_files": 2}
    assert report.train.num_documents == 797
    lines = (tmp_path / "corpus" / "bad_records.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(Path(bad["file"]).name, bad["line"], bad["byte_offset"]) for bad in found] == [
        ("a.jsonl", 4, None),
        ("a.jsonl", 401, None),
        ("a.jsonl", 402, None),
        ("a.jsonl", 800, None),
        ("b.txt", 30_001, 15 * 30_000 + 3),
    ]
    train, _ = split_texts(tmp_path / "corpus")
    expected = [make_text(i, 120) for i in range(800) if i not in (3, 400, 401, 799)]
    assert train == [*expected, "good"]


def test_bad_records_stop_by_default_and_say_where(tmp_path: Path) -> None:
    folder = bad_corpus(tmp_path)
    output = tmp_path / "corpus"
    with pytest.raises(UserError) as error:
        prepare_quietly(output, folder, unit_bytes=UNIT)
    text = str(error.value)
    assert "1 bad record so far" in text
    assert f"{folder}/a.jsonl, line 4: 'text' holds int, expected a string" in text
    assert "--bad-records skip" in text
    assert len((output / "bad_records.jsonl").read_text().splitlines()) == 1
    assert not (output / "metadata.json").exists()
    with pytest.raises(UserError, match="preparation was not finished"):
        Corpus.open(output)
    # What was done is kept, and the same folder goes on when told to skip.
    report = prepare_quietly(output, folder, unit_bytes=UNIT, bad_records="skip")
    assert report.num_resumed_bytes > 0
    assert report.counts["bad_records"] == 5
    prepare_quietly(tmp_path / "fresh", folder, unit_bytes=UNIT, bad_records="skip")
    assert folder_bytes(output) == folder_bytes(tmp_path / "fresh")


def test_the_first_few_bad_records_are_shown(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("not json\n" * 20)
    with pytest.raises(UserError, match=r"20 bad records so far") as error:
        prepare_quietly(tmp_path / "corpus", tmp_path / "a.jsonl")
    assert "line 5: not JSON" in str(error.value)
    assert "line 6" not in str(error.value)
    assert "... and 15 more" in str(error.value)


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_nothing_left_is_an_error(tmp_path: Path, tokenizer: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").touch()
    (folder / "b.bin").write_bytes(b"\0\1")
    (folder / "c.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"no text to train|is left: 2 without text, 1 binary"):
        prepare_quietly(tmp_path / "corpus", folder, tokenizer=tokenizer)


def test_a_document_too_long_for_the_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "MAX_DOCUMENT_TOKENS", 100)
    monkeypatch.setattr(indexed, "MAX_DOCUMENT_TOKENS", 100)
    (tmp_path / "a.txt").write_text("x" * 99)
    assert prepare_quietly(tmp_path / "fits", tmp_path / "a.txt").train.num_tokens == 100
    (tmp_path / "b.txt").write_text("x" * 100)
    with pytest.raises(UserError, match=r"a document of 100 tokens in .*b\.txt"):
        prepare_quietly(tmp_path / "corpus", tmp_path / "b.txt")


def test_large_vocabularies_are_stored_as_int32(tmp_path: Path) -> None:
    small_bpe().save(tmp_path / "mine")
    path = tmp_path / "mine" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["vocab"]["far"] = 70_000
    path.write_text(json.dumps(tree))
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    prepare_quietly(tmp_path / "corpus", tmp_path / "a.jsonl", tokenizer=str(path))
    assert Corpus.open(tmp_path / "corpus").train.read(0).dtype == np.int32
    assert sorted(chain(*split_texts(tmp_path / "corpus"))) == ["one", "two"]
