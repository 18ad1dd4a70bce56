from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ext.data.inputs import list_inputs
from megatron_ext.data.records import BadRecord, Event, Piece, Skipped, read_part
from megatron_ext.data.settings import PrepareSettings
from megatron_ext.data.units import cut_into_units
from megatron_ext.errors import UserError

MAX_RECORD_BYTES = 1000


def events(path: Path, *, unit_bytes: int = 1 << 20, text_key: str = "text") -> list[Event]:
    """Everything that reading the file gives, piece after piece of it."""
    settings = PrepareSettings(inputs=(str(path),), output=path.parent / "out")
    units = cut_into_units(list_inputs(settings), unit_bytes=unit_bytes, text_key=text_key)
    return [
        event
        for unit in units
        for part in unit.parts
        for event in read_part(
            part,
            text_key=text_key,
            max_record_bytes=MAX_RECORD_BYTES,
            advance=lambda _: None,
        )
    ]


def texts(found: Iterable[Event]) -> list[str]:
    return [event.text for event in found if isinstance(event, Piece)]


def bad(found: Iterable[Event]) -> list[BadRecord]:
    return [event for event in found if isinstance(event, BadRecord)]


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\ntwo \u4e16".encode())
    (piece, _) = events(path)
    assert piece == Piece("one\r\n\ntwo \u4e16", 13, ends_document=True)


def test_invalid_utf8_is_found_with_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nbad \xff\xfe\n")
    found = events(path)
    assert texts(found) == []
    assert bad(found) == [BadRecord(str(path), 2, 9, "not UTF-8 (byte 0xff)")]
    assert str(bad(found)[0]) == f"{path}, line 2, byte 9: not UTF-8 (byte 0xff)"


@pytest.mark.parametrize("cut_short", [b"\xe4\xb8", b"\xf0\x9f\x98"])
def test_a_character_that_is_cut_off_is_no_utf8(tmp_path: Path, cut_short: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"text" + cut_short)
    assert bad(events(path))[0].byte_offset == 4


def test_records_that_are_no_text_are_reported_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines({"text": "one"})
        + b"\n  \n"  # blank lines are no records
        + b'{"text": "tw\n'
        + b'{"text": "th\xffree"}\n'
        + lines({"body": "x", "id": 4}, {"text": 5}, {"text": None}, ["text"], {"text": ""})
        + b'{"text": "\\ud800"}\n'
        + b"[" * 900
        + b"\n"
        + b'{"text": '
        + b"9" * 900
        + b"}\n"
        + lines({"text": "y" * 2000}, {"text": "last"})
    )
    found = events(path)
    assert texts(found) == ["one", "last"]
    assert [event for event in found if isinstance(event, Skipped)] == [Skipped("empty")]
    reasons = [(record.line, record.byte_offset, record.reason) for record in bad(found)]
    expected = [
        (4, None, "not JSON: Invalid control character at column 13"),
        (5, 45, "not UTF-8 (byte 0xff)"),
        (6, None, "no key 'text'; it has 'body', 'id'"),
        (7, None, "'text' holds int, expected a string"),
        (8, None, "'text' holds null, expected a string"),
        (9, None, "expected a JSON object with the key 'text', found list"),
        (11, None, "lone surrogate at character 0"),
    ]
    assert reasons[:7] == expected
    assert [line for line, _, _ in reasons[7:]] == [12, 13, 14]
    assert reasons[9][2] == f"longer than --max-record-bytes {MAX_RECORD_BYTES}"


def test_deep_json_is_a_bad_record_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":' * 100_000 + b"\n" + lines({"text": "after"}))
    settings = PrepareSettings(inputs=(str(path),), output=tmp_path / "out")
    (unit,) = cut_into_units(list_inputs(settings), unit_bytes=1 << 20, text_key="text")
    found = list(
        read_part(unit.parts[0], text_key="text", max_record_bytes=1 << 20, advance=lambda _: None)
    )
    assert texts(found) == ["after"]
    assert bad(found)[0].line == 1


def test_a_byte_order_mark_before_the_first_record_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines({"text": "one"}, {"text": "two"}))
    assert texts(events(path)) == ["one", "two"]


def test_another_key_may_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"content": "one", "text": "wrong"}))
    assert texts(events(path, text_key="content")) == ["one"]


@pytest.mark.parametrize("unit_bytes", [7, 20, 33, 1000])
def test_ranges_of_a_file_hold_every_record_once(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    expected = [f"record {i}" * (i % 5 + 1) for i in range(40)]
    path.write_bytes(lines(*({"text": text} for text in expected)).rstrip(b"\n"))
    assert texts(events(path, unit_bytes=unit_bytes)) == expected


def compress(name: str, content: bytes) -> bytes:
    return gzip.compress(content) if name.endswith("gz") else zstandard.compress(content)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz"])
def test_compressed_records_are_read_over_all_members(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    halves = [lines(*({"text": f"{i}" * 50} for i in part)) for part in (range(50), range(50, 99))]
    path.write_bytes(b"".join(compress(name, half) for half in halves))
    assert texts(events(path)) == [f"{i}" * 50 for i in range(99)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_cut_or_damaged_compressed_file_is_reported(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = lines(*({"text": f"{i * 7919 % 10007}" * 9} for i in range(5000)))
    whole = compress(name, content)
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"nonsense" + whole):
        path.write_bytes(damaged)
        (record,) = bad(events(path))
        assert "damaged" in record.reason
        assert record.line <= 5001


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_a_compressed_text_is_one_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = "a line of text\n" * 100_000
    path.write_bytes(compress(name, text.encode()))
    found = events(path)
    assert "".join(texts(found)) == text
    assert sum(event.ends_document for event in found if isinstance(event, Piece)) == 1
    path.write_bytes(compress(name, text.encode())[:-1])
    assert "damaged" in bad(events(path))[0].reason
    path.write_bytes(compress(name, b""))
    assert Skipped("empty") in events(path)
    path.write_bytes(compress(name, b"GIF\0"))
    assert Skipped("binary") in events(path)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = [f"row {i}" for i in range(20)]
    values[7] = ""
    table = pyarrow.table({"text": [*values, None], "id": list(range(21))})
    pyarrow.parquet.write_table(table, path, row_group_size=6, compression="zstd")
    for unit_bytes in (1, 1 << 20):
        found = events(path, unit_bytes=unit_bytes)
        assert texts(found) == [text for text in values if text]
        assert [(record.line, record.reason) for record in bad(found)] == [
            (21, "'text' holds null, expected a string")
        ]


def test_parquet_without_the_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(UserError, match="no column 'text'; it has 'body', 'id'"):
        events(path)
    with pytest.raises(UserError, match="column 'id' holds int64, expected strings"):
        events(path, text_key="id")
    assert texts(events(path, text_key="body")) == ["x"]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"a\.parquet is not a parquet file"):
        events(path, text_key="body")


def test_damage_inside_a_row_group_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"row {i * 7919}" for i in range(1000)]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[60:400] = b"\xff" * 340
    path.write_bytes(content)
    assert "damaged row group 0" in bad(events(path))[0].reason


def test_a_file_that_changed_since_it_was_listed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    settings = PrepareSettings(inputs=(str(path),), output=tmp_path / "out")
    (unit,) = cut_into_units(list_inputs(settings), unit_bytes=1 << 20, text_key="text")
    path.write_text("after a change")
    reading = read_part(
        unit.parts[0], text_key="text", max_record_bytes=100, advance=lambda _: None
    )
    with pytest.raises(UserError, match=r"a\.txt changed while it was being prepared: 6 bytes"):
        next(reading)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="cannot read"):
        next(
            read_part(unit.parts[0], text_key="text", max_record_bytes=100, advance=lambda _: None)
        )
