"""The benchmark of plan quality: its length sets are as published, its table is complete."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.bench import hdp_quality
from scripts.bench.hdp_quality import Layout, main, measure_set, summary
from scripts.bench.length_sets import LENGTH_SETS
from scripts.bench.seven_billion import SEVEN_BILLION, seven_billion_cost

BY_NAME = {lengths_of.name: lengths_of for lengths_of in LENGTH_SETS}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        (
            "wikipedia",
            {"mean": 1014, "p50": 347, "p90": 2112, "p99": 10_919, "tokens_above_8K": 0.275},
        ),
        (
            "prolong",
            {"mean": 3052, "p50": 1913, "p90": 6051, "p99": 16_269, "tokens_above_8K": 0.254},
        ),
        (
            "wlb_llm",
            {"mean": 3962, "p50": 3227, "p90": 5784, "p99": 26_058, "tokens_above_32K": 0.170},
        ),
        ("bytescale_github", {"tokens_above_128K": 0.162, "tokens_above_256K": 0.098}),
        (
            "bytescale_byted",
            {
                "p80": 4096,
                "tokens_above_128K": 0.443,
                "tokens_above_256K": 0.37,
                "tokens_at_2M": 0.121,
            },
        ),
    ],
)
def test_sets_are_as_published(name: str, published: dict[str, float]) -> None:
    found = BY_NAME[name].describe(300_000)
    for key, value in published.items():
        assert found[key] == pytest.approx(value, rel=0.12), key


def test_the_histogram_comes_back() -> None:
    lengths = BY_NAME["magi_attention"].draw((np.arange(100_000) + 0.5) / 100_000)
    borders = [0, 50, 200, 500, 1024, 2048, 4096, 8192]
    shares = np.histogram(lengths, borders)[0] / 1000
    # The published percentages add up to 99.8.
    assert shares.tolist() == pytest.approx([3.1, 15.4, 28.2, 24.6, 15.7, 7.3, 3.0], abs=0.1)


def test_batches_have_the_tokens_and_keep_the_cap() -> None:
    for lengths_of in LENGTH_SETS:
        batch = lengths_of.batch(300_000, longest=65_536, seed=3)
        assert batch == lengths_of.batch(300_000, longest=65_536, seed=3)
        assert max(batch) <= 65_536
        assert min(batch) >= 1
        assert sum(batch[:-1]) < 300_000 <= sum(batch)
        # Many short sequences take more than one draw.
        assert sum(lengths_of.batch(9_000_000, longest=65_536, seed=1)) >= 9_000_000


def test_the_cost_is_that_of_a_7b_model() -> None:
    assert SEVEN_BILLION.matmul_parameters == pytest.approx(6.2e9, rel=0.01)
    cost = seven_billion_cost()
    # 6 P s + 3.5 (2 L H s^2) at 400 TFLOP/s.
    flops = 6 * SEVEN_BILLION.matmul_parameters * 1000 + 3.5 * 2 * 32 * 4096 * 1000**2
    assert cost.sequence_seconds(1000) == pytest.approx(flops / 400e12, rel=1e-3)
    assert cost.communication is not None
    hop_bytes = cost.communication.key_value_bytes
    assert hop_bytes == 2 * 8 * 128 * 2 * 32
    # Forward hops hide from 4,000 tokens a rank on.
    assert cost.max_useful_ranks(480_000) == pytest.approx(480_000 / 4950, abs=3)


def test_all_planners_on_one_batch() -> None:
    cost = seven_billion_cost()
    for layout, least in ((Layout(8), 0.99), (Layout(8, 2, 4), 0.75)):
        found = {
            name: summary(measure_set(name, BY_NAME["wlb_llm"], layout, seeds=[0], cost_model=cost))
            for name in hdp_quality.PLANNERS
        }
        assert found["hdp"]["median"] >= least
        for peer in ("megatron", "static_cp"):
            assert 0.1 < found[peer]["median"] < found["hdp"]["median"]


def test_peers_are_not_asked_for_what_takes_them_too_long() -> None:
    assert (
        measure_set(
            "static_cp",
            BY_NAME["wikipedia"],
            Layout(128),
            seeds=[0],
            cost_model=seven_billion_cost(),
        )
        == []
    )


def test_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdp_quality, "LENGTH_SETS", LENGTH_SETS[:2])
    monkeypatch.setattr(hdp_quality, "planning_times", lambda _: {"a case": 0.25})
    path = tmp_path / "quality.json"
    arguments = ["--ranks", "8", "--stages", "1", "2", "--seeds", "2", "--planners", "hdp"]
    monkeypatch.setattr(sys, "argv", ["hdp_quality", *arguments, "--json", str(path)])
    main()
    report = json.loads(path.read_text())
    sets = [(row["num_stages"], row["set"]) for row in report["rows"]]
    assert sets == [(n, name) for n in (1, 2) for name in ("wikipedia", "prolong", "all")]
    assert [row["batches"] for row in report["planners"]] == [4, 4]
    assert not math.isnan(report["planners"][0]["median"])
    printed = capsys.readouterr().out
    assert "hdp       R     8 P 2 E 1 wikipedia" in printed
    assert "a case: 250 ms" in printed
