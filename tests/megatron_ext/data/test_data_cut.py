from __future__ import annotations

import functools
import io
import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data import cut
from megatron_ext.data.cut import cut_points, find_cut, find_file_cut, iter_blocks
from megatron_ext.data.tokenizer import JsonTokenizer, Tokenizer
from tests.megatron_ext.data.corpora import small_bpe

TEXTS = st.text(
    st.sampled_from("ab1 .'\n\t(\u00e9\u3000\u4e16\U0001f600"), min_size=2, max_size=200
)
# What every usual word pattern cuts at, too.
CLEAN = re.compile(rb"[!-~]\n\Z")


@given(TEXTS, st.data())
def test_a_cut_never_splits_a_character(text: str, data: st.DataObject) -> None:
    content = text.encode()
    earliest = data.draw(st.integers(1, len(content)))
    position = find_cut(content, earliest)
    assert earliest <= position <= len(content)
    assert content[:position].decode() + content[position:].decode() == text


@given(TEXTS, st.data())
def test_a_clean_cut_does_not_change_the_tokens(text: str, data: st.DataObject) -> None:
    content = text.encode()
    position = find_cut(content, data.draw(st.integers(1, len(content))))
    before, after = content[:position], content[position:]
    if CLEAN.search(before) and re.match(rb"[!-~]", after):
        for tokenizer in (small_bpe(), gpt2_words()):
            parts = tokenizer.encode_batch([before.decode(), after.decode()])
            assert parts[0] + parts[1] == tokenizer.encode(text)


@functools.cache
def gpt2_words() -> Tokenizer:
    """The same vocabulary with GPT-2's word pattern."""
    tree = json.loads(small_bpe()._canonical)
    words = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "use_regex": True,
        "trim_offsets": True,
    }
    tree["pre_tokenizer"] = words
    return JsonTokenizer(json.dumps(tree))


def test_the_best_place_wins() -> None:
    assert find_cut(b"one two\n\nthree\nfour", 2) == len("one two\n\nthree\n")
    assert find_cut(b"one two\n\n  three", 2) == len("one two\n")
    assert find_cut(b"one two three", 4) == len("one two")
    assert find_cut("\u4e16\u754c".encode(), 1) == 3


@given(st.lists(TEXTS, min_size=1, max_size=8), st.integers(1, 40))
def test_blocks_are_the_whole(parts: list[str], chunk: int) -> None:
    content = "".join(parts).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "BLOCK_BYTES", 64)
        patch.setattr(cut, "WINDOW_BYTES", 16)
        blocks = list(iter_blocks(_Trickle(content, chunk)))
        points = list(cut_points(content))
    assert b"".join(blocks) == content
    assert all(len(block) <= 64 + 16 + 4 for block in blocks)
    assert [content[start:end] for start, end in points if end > start] == blocks or len(points) > 1
    assert b"".join(content[start:end] for start, end in points) == content
    for block in blocks:
        block.decode()


class _Trickle(io.BytesIO):
    """A stream that gives a few bytes at a time, as decompressors may."""

    def __init__(self, content: bytes, chunk: int) -> None:
        super().__init__(content)
        self._chunk = chunk

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._chunk if size is None or size < 0 else min(self._chunk, size))


@given(TEXTS, st.integers(2, 6))
def test_pieces_of_a_file_meet(text: str, num_pieces: int) -> None:
    content = text.encode()
    stream = io.BytesIO(content)
    nominal = [len(content) * i // num_pieces for i in range(num_pieces + 1)]
    cuts = [find_file_cut(stream, position, len(content)) for position in nominal]
    assert cuts[0] == 0
    assert cuts[-1] == len(content)
    for start, end in pairwise(cuts):
        content[start : max(start, end)].decode()
