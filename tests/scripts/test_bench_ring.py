"""The ring benchmark: its batches, and that it runs and writes what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.ring import hops_seconds, main, report
from scripts.bench.ring_sides import BATCHES, Shape, batch_layouts, num_pairs


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_batches_fill_all_ranks_and_share_sequences(name: str, num_ranks: int) -> None:
    layouts = batch_layouts(name, num_ranks=num_ranks, tokens_per_rank=120)
    for layout in layouts:
        tokens = sum(piece.num_tokens for piece in layout.pieces)
        # The shared sequences come in whole parts; a rest of 2 tokens may stay free.
        assert 112 <= tokens <= 120
        assert [len(ring.ranks) for ring in layout.rings] == [num_ranks]
        assert len(layout.rings[0].pieces[0]) == len(BATCHES[name])
    lengths: dict[int, int] = {}
    for piece in (piece for layout in layouts for piece in layout.pieces):
        lengths[piece.sequence] = max(piece.end, lengths.get(piece.sequence, 0))
    assert num_pairs(layouts) == sum(s * (s + 1) // 2 for s in lengths.values())


def test_report_takes_ratios_within_rounds() -> None:
    layouts = batch_layouts("one sequence", num_ranks=2, tokens_per_rank=8)
    seconds = {
        "ring": [2.0, 10.0, 4.0],
        "compute": [1.0, 9.0, 1.0],
        "communication": [0.5, 1.0, 3.0],
        "whole": [1.0, 5.0, 1.0],
    }
    found = report("one sequence", Shape(2, 1, 4, "float32"), layouts, seconds)
    assert found["ring_seconds"] == 4.0
    assert found["limit_over_ring"] == 0.75
    assert found["whole_over_ring"] == 0.5
    # 136 pairs, 8 channels, 4 FLOPs forward and 10 backward; two ranks, 4 seconds.
    assert found["gflops_per_second_per_rank"] == pytest.approx(136 * 8 * 14 / 2 / 4.0 / 1e9)


def test_a_short_run_on_two_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ring.json"
    sizes = ["--tokens-per-rank", "64", "--heads", "2", "--groups", "1", "--head-dim", "8"]
    code = main([*sizes, "--rounds", "1", "--dtypes", "float32", "--json", str(path)])
    assert code == 0, capfd.readouterr().err
    tree: dict[str, Any] = json.loads(path.read_text())
    assert [record["batch"] for record in tree["results"]] == list(BATCHES)
    for record in tree["results"]:
        assert record["num_ranks"] == 2
        assert record["ring_seconds"] > 0
        assert record["limit_over_ring"] > 0
    # Keys and values of 64 tokens forward, and backward again with their gradients.
    assert tree["results"][0]["bytes_sent_by_rank_0"] == 3 * 64 * 2 * 8 * 4
    assert "limit over ring" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("compute", "communication", "expected"),
    [
        # All hidden behind half the computation.
        (7.0, 0.9, 7.0),
        # float32: a third forward. 3 - 7 / 3.5 / 2 = 2 forward and 6 - 5 / 2 = 3.5 backward show.
        (7.0, 9.0, 12.5),
        (0.0, 9.0, 9.0),
    ],
)
def test_what_a_ring_takes_at_least(compute: float, communication: float, expected: float) -> None:
    assert hops_seconds(compute, communication, share=0.5, dtype="float32") == expected
