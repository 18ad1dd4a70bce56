from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data import indexed
from megatron_ext.data.indexed import HEADER, IndexedWriter, TokenFile
from megatron_ext.errors import UserError

EOD = 300


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: npt.DTypeLike) -> str:
    """Each document in a call of its own, its bytes taken for 3 times its tokens."""
    writer = IndexedWriter(prefix, dtype)
    for ids in documents:
        writer.write_ids(np.array([*ids, EOD], dtype).tobytes())
        writer.add_documents(np.array([len(ids)]), np.array([3 * len(ids)]))
    return writer.finish()


DOCUMENTS = st.lists(st.lists(st.integers(0, 299), max_size=20), max_size=12)


@settings(max_examples=40)
@given(DOCUMENTS, st.sampled_from([np.uint16, np.int32]))
def test_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    dtype: type[np.integer[npt.NBitBase]],
) -> None:
    prefix = tmp_path_factory.mktemp("tokens") / "train"
    write(prefix, documents, dtype)
    tokens = TokenFile(prefix)
    assert [ids.tolist() for ids in tokens.documents()] == [[*ids, EOD] for ids in documents]
    assert tokens.num_documents == len(documents)
    assert tokens.num_tokens == sum(len(ids) + 1 for ids in documents)
    assert tokens.document_lengths.tolist() == [len(ids) + 1 for ids in documents]
    assert tokens.document_bytes.tolist() == [3 * len(ids) for ids in documents]
    for document, ids in enumerate(documents):
        assert tokens.read(document, 0, len(ids)).tolist() == ids
        assert tokens.read(document, len(ids)).tolist() == [EOD]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_the_files(tmp_path: Path, dtype: type[np.integer[npt.NBitBase]]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [[1, 2, 3], [], [299] * 1000, [7]]
    write(tmp_path / "train", documents, dtype)
    dataset = IndexedDataset(str(tmp_path / "train"))
    assert len(dataset) == len(documents)
    assert dataset.index.dtype == dtype
    assert dataset.sequence_lengths.tolist() == [len(ids) + 1 for ids in documents]
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    for document, ids in enumerate(documents):
        assert dataset[document].tolist() == [*ids, EOD]
        assert dataset.get(document, offset=len(ids)).tolist() == [EOD]


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [[1, 2], [3]], np.uint16)
    assert write(tmp_path / "b", [[1, 2], [3]], np.uint16) == first
    assert write(tmp_path / "c", [[1], [2, 3]], np.uint16) != first
    assert write(tmp_path / "d", [[1, 2], [4]], np.uint16) != first


def test_reading_out_of_range_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train", [[1, 2], [3]], np.uint16)
    tokens = TokenFile(tmp_path / "train")
    for arguments in ((2, 0, 1), (-1, 0, 1), (0, 0, 4), (0, 2, 1), (0, -1, 1)):
        with pytest.raises(IndexError):
            tokens.read(*arguments)


def _prepared(tmp_path: Path) -> tuple[Path, Path, Path]:
    write(tmp_path / "train", [[1, 2], [3], [4, 5, 6]], np.uint16)
    return indexed.split_files(tmp_path / "train")


@pytest.mark.parametrize("name", [".bin", ".idx", ".documents.npy"])
@pytest.mark.parametrize("change", [-1, -30, 1])
def test_every_wrong_size_is_refused(tmp_path: Path, name: str, change: int) -> None:
    _prepared(tmp_path)
    path = tmp_path / f"train{name}"
    size = max(0, path.stat().st_size + change)
    os.truncate(path, size)
    with pytest.raises(UserError) as error:
        TokenFile(tmp_path / "train")
    text = str(error.value)
    assert path.name in text
    assert "expected" in text
    assert f"found {size} bytes" in text
    assert "prepare the corpus again" in text


@pytest.mark.parametrize("size", [0, 5, HEADER.size - 1, HEADER.size, HEADER.size + 7])
def test_an_index_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    _, idx_path, _ = _prepared(tmp_path)
    os.truncate(idx_path, size)
    with pytest.raises(UserError, match=rf"train\.idx: expected .* found {size} bytes"):
        TokenFile(tmp_path / "train")


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"GIF89a", "expected to begin with"),
        (9, struct.pack("<Q", 2), "found version 2"),
        (17, b"\x07", "and type 7"),
        # Far more documents than the file can hold: refused before anything is allocated.
        (18, struct.pack("<QQ", 2**60, 2**60 + 1), "found 96 bytes"),
        (26, struct.pack("<Q", 3), "expected 4 document borders"),
        (HEADER.size + 8, struct.pack("<i", 40), "found 18 bytes"),
        (HEADER.size + 12 + 16, struct.pack("<q", -(2**40)), "do not fit"),
        (HEADER.size + 36 + 24, struct.pack("<q", 9), "do not fit"),
    ],
)
def test_a_wrong_header_is_refused(
    tmp_path: Path, offset: int, content: bytes, message: str
) -> None:
    _, idx_path, _ = _prepared(tmp_path)
    data = bytearray(idx_path.read_bytes())
    assert len(data) == 96 + 6
    data[offset : offset + len(content)] = content
    idx_path.write_bytes(data[: 96 if b"96" in message.encode() else None])
    with pytest.raises(UserError, match=message):
        TokenFile(tmp_path / "train")


def test_a_start_that_points_away_is_refused_when_read(tmp_path: Path) -> None:
    _, idx_path, _ = _prepared(tmp_path)
    data = bytearray(idx_path.read_bytes())
    data[HEADER.size + 12 + 8 : HEADER.size + 12 + 16] = struct.pack("<q", 2**40)
    idx_path.write_bytes(data)
    tokens = TokenFile(tmp_path / "train")
    assert tokens.read(0).tolist() == [1, 2, EOD]
    with pytest.raises(UserError, match="document 1 should lie at"):
        tokens.read(1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in _prepared(tmp_path):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name} is missing"):
            TokenFile(tmp_path / "train")
        path.write_bytes(content)


def test_foreign_rows_are_refused(tmp_path: Path) -> None:
    _, _, documents_path = _prepared(tmp_path)
    np.save(documents_path, np.zeros(3))
    with pytest.raises(UserError, match=r"train\.documents\.npy"):
        TokenFile(tmp_path / "train")
    documents_path.write_bytes(b"no numpy file" * 20)
    with pytest.raises(UserError, match=r"not a \.npy file"):
        TokenFile(tmp_path / "train")
