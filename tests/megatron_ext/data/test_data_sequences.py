from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.indexed import IndexedWriter, TokenFile, split_files
from megatron_ext.data.sequences import SequenceIndex
from megatron_ext.errors import UserError

EOD = 500


def token_file(folder: Path, documents: list[list[int]]) -> TokenFile:
    writer = IndexedWriter(folder / "train", np.uint16)
    for ids in documents:
        writer.write_ids(np.array([*ids, EOD], np.uint16).tobytes())
    lengths = np.array([len(ids) for ids in documents], np.int64)
    writer.add_documents(lengths, 2 * lengths)
    writer.finish()
    return TokenFile(folder / "train")


DOCUMENTS = st.lists(st.lists(st.integers(0, 499), max_size=30), min_size=1, max_size=20)


@settings(max_examples=40)
@given(DOCUMENTS, st.integers(1, 40))
def test_every_token_is_predicted_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], longest: int
) -> None:
    index = SequenceIndex(token_file(tmp_path_factory.mktemp("x"), documents), longest)
    predicted: dict[tuple[int, int], tuple[int, int]] = {}
    numbers = np.arange(index.num_sequences)
    lengths = index.lengths(numbers)
    for number, document, start, end in zip(numbers, *index.locate(numbers), strict=True):
        tokens, labels = index.read(int(number))
        assert len(tokens) == len(labels) == end - start == lengths[number] <= longest
        assert tokens.dtype == labels.dtype == np.int64
        for offset, pair in enumerate(zip(tokens.tolist(), labels.tolist(), strict=True)):
            key = (int(document), int(start) + offset)
            assert key not in predicted
            predicted[key] = pair
    expected = {
        (document, position): pair
        for document, ids in enumerate(documents)
        for position, pair in enumerate(zip([EOD, *ids], [*ids, EOD], strict=True))
    }
    assert predicted == expected
    assert index.num_tokens == len(expected) == lengths.sum()


@settings(max_examples=40)
@given(DOCUMENTS, st.integers(1, 12))
def test_pieces_of_documents_are_counted(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], longest: int
) -> None:
    index = SequenceIndex(token_file(tmp_path_factory.mktemp("x"), documents), longest)
    counts = [-(-(len(ids) + 1) // longest) for ids in documents]
    assert index.num_documents_cut == sum(count > 1 for count in counts)
    assert index.num_pieces == sum(count for count in counts if count > 1)
    numbers = [index.of_document(document).tolist() for document in range(len(documents))]
    assert list(chain.from_iterable(numbers)) == list(range(index.num_sequences))
    assert [len(part) for part in numbers] == counts


@settings(max_examples=40)
@given(st.data())
def test_a_part_is_a_part_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    documents = data.draw(DOCUMENTS)
    index = SequenceIndex(token_file(tmp_path_factory.mktemp("x"), documents), 9)
    number = data.draw(st.integers(0, index.num_sequences - 1))
    tokens, labels = index.read(number)
    start = data.draw(st.integers(0, len(tokens)))
    end = data.draw(st.integers(start, len(tokens)))
    part = index.read(number, start, end)
    assert part[0].tolist() == tokens[start:end].tolist()
    assert part[1].tolist() == labels[start:end].tolist()


def test_look_ups_in_a_large_index_are_right(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    sizes = np.where(draw.random(3000) < 0.02, draw.integers(1000, 9000, 3000), 3)
    index = SequenceIndex(token_file(tmp_path, [[1] * int(size) for size in sizes]), 16)
    pieces = -(-(sizes + 1) // 16)
    expected = np.repeat(np.arange(len(sizes)), pieces)
    documents, starts, ends = index.locate(np.arange(index.num_sequences))
    assert (documents == expected).all()
    assert (ends - starts).sum() == index.num_tokens


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    tokens = token_file(tmp_path, [[1, 2, 3], [4]])
    index = SequenceIndex(tokens, 2)
    for number in (-1, 3):
        with pytest.raises(IndexError):
            index.read(number)
    for start, end in ((0, 3), (2, 1), (-1, 1)):
        with pytest.raises(IndexError):
            index.read(0, start, end)
    with pytest.raises(IndexError):
        index.of_document(2)
    with pytest.raises(UserError, match="max_sequence_length = 0"):
        SequenceIndex(tokens, 0)
    assert SequenceIndex(tokens, 2**40).num_sequences == 2


def test_lengths_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    token_file(tmp_path, [[1, 2, 3], [4], [5]])
    _, idx_path, _ = split_files(tmp_path / "train")
    data = bytearray(idx_path.read_bytes())
    data[34:38] = (9).to_bytes(4, "little")
    idx_path.write_bytes(data)
    with pytest.raises(UserError, match="add up to 13 ids, the file has 8"):
        SequenceIndex(TokenFile(tmp_path / "train"), 4)


def test_an_empty_split_has_no_sequences(tmp_path: Path) -> None:
    index = SequenceIndex(token_file(tmp_path, []), 4)
    assert index.num_sequences == index.num_tokens == index.num_documents_cut == 0
    assert index.lengths([]).tolist() == []
