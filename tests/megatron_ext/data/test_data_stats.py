from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.stats import describe_stats, measure, plot_lengths
from megatron_ext.errors import UserError
from tests.megatron_ext.data.corpora import prepare_quietly


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, list[int]]:
    """Documents of known lengths in bytes, which are their tokens."""
    draw = np.random.default_rng(0)
    lengths = [*(int(x) for x in draw.lognormal(5, 2, 300) + 1), 150_000, 2047, 2048]
    lines = (json.dumps({"text": chr(97 + i % 26) * n}) for i, n in enumerate(lengths))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare_quietly(tmp_path / "corpus", tmp_path / "a.jsonl", validation_fraction=0.0)
    return tmp_path / "corpus", [length + 1 for length in lengths]


def test_statistics_are_those_of_the_lengths(corpus: tuple[Path, list[int]]) -> None:
    path, lengths = corpus
    train = measure(path).splits["train"]
    assert train.num_documents == len(lengths)
    assert train.num_tokens == sum(lengths)
    assert train.num_bytes == sum(lengths) - len(lengths)
    assert train.bytes_per_token == train.num_bytes / train.num_tokens
    assert train.max_length == max(lengths)
    ordered = sorted(lengths)
    for name, value in train.length_percentiles.items():
        at_most = sum(length <= value for length in lengths) / len(lengths)
        assert at_most >= float(name) / 100
        assert value in ordered
    for limit, share in train.token_share_longer_than.items():
        longer = sum(length for length in lengths if length > int(limit))
        assert share == longer / sum(lengths)
    for border, count in train.histogram.items():
        assert count == sum(int(border) <= length < 2 * int(border) for length in lengths)
    assert sum(train.histogram.values()) == len(lengths)


def test_the_text_and_the_json_say_it(corpus: tuple[Path, list[int]]) -> None:
    path, lengths = corpus
    stats = measure(path)
    text = describe_stats(stats)
    assert f"{len(lengths):,} documents" in text
    assert f"max {max(lengths):,}" in text
    assert "128K+            1" in text
    assert json.loads(json.dumps(stats.to_dict()))["splits"]["validation"]["num_documents"] == 0


def test_a_picture_is_drawn(corpus: tuple[Path, list[int]], tmp_path: Path) -> None:
    plot_lengths(corpus[0], tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("lengths.nonsense", "none/lengths.png"):
        with pytest.raises(UserError, match="--plot"):
            plot_lengths(corpus[0], tmp_path / name)
