"""`plan-step`: a file of lengths in, a plan out; what cannot be planned is told with numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import plan_step_command
from megatron_ext.cli import main
from megatron_ext.planners import ask_planner
from parallel.plan.records import StepPlan

LENGTHS = [20_000, 3000, 900, 50, 12_000, 400, 7000, 64]


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.txt"
    path.write_text("".join(f"{length}\n" for length in LENGTHS))
    return path


def command(path: Path, *words: str) -> list[str]:
    options = ["--ranks", "4", "--tokens-per-rank", "8192"]
    return ["plan-step", "--lengths", str(path), *options, *words]


@pytest.mark.parametrize("planner", ["hdp", "static_cp", "megatron"])
def test_json_is_a_valid_plan_with_its_prediction(
    lengths: Path, capsys: pytest.CaptureFixture[str], planner: str
) -> None:
    assert main(command(lengths, "--planner", planner, "--json")) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["ranks"] == 4
    plan = StepPlan.from_dict(tree)
    plan.check()
    assert list(plan.lengths) == LENGTHS
    predicted = tree["predicted"]
    assert predicted["efficiency"] == pytest.approx(
        predicted["bound_seconds"] / predicted["step_seconds"]
    )
    assert 0.0 < predicted["efficiency"] <= 1.0
    assert tree["plan_seconds"] >= 0.0


def test_words_and_picture(
    lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plots" / "plan.png"
    assert main(command(lengths, "--pipeline", "2", "--plot", str(picture))) == 0
    text = capsys.readouterr().out
    assert "8 with 43,414 tokens" in text
    assert "efficiency" in text
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("12\nx\n", "line 2 is 'x'; expected the number of tokens"),
        ("12\n-3\n", "line 2 is '-3'"),
        ("", "is empty"),
        ("99999999\n", "99999999 tokens"),
    ],
)
def test_what_cannot_be_planned_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(content)
    assert main(command(path)) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "absent.txt")) == 2
    assert "absent.txt: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--ranks", "--tokens-per-rank", "--pipeline", "--teraflops"])
def test_numbers_must_be_above_0(
    lengths: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main(command(lengths, option, "0")) == 2
    assert f"{option} 0" in capsys.readouterr().err


def test_a_plan_that_cannot_run_is_no_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("500\n30000\n9000\n9000\n9000\n12000\n3000\n3000\n")
    assert main(command(path, "--planner", "megatron")) == 0
    assert main(command(path, "--planner", "megatron", "--pipeline", "2")) == 0
    capsys.readouterr()

    def forgetful(*arguments: Any, num_pipeline_stages: int, **options: Any) -> StepPlan:
        return ask_planner(*arguments, **options)

    # Its ranks meet at different indices, which a pipeline's schedule does not allow.
    monkeypatch.setattr(plan_step_command, "ask_planner", forgetful)
    assert main(command(path, "--planner", "megatron", "--pipeline", "2")) == 2
    assert "must have the same index" in capsys.readouterr().err
