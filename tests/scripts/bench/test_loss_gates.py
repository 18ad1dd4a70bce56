"""The script of the loss gates: runs are what their names say, and are made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from megatron_ext.config import Config
from megatron_ext.config_check import check_config
from megatron_ext.precision.chosen_recipe import chosen_recipe
from megatron_ext.precision.linear_recipe import OPERANDS, linear_recipes
from scripts.bench import loss_gates
from scripts.bench.loss_gates import RUNS, comparable, main, read_runs, table
from tests.megatron_ext.tiny_run import make_corpus
from tests.rank_pool import Ranks


def finished(name: str, seed: int, loss: float, steps: int = 4) -> dict[str, Any]:
    curve = [{"step": step, "loss": loss + 1 / step} for step in (2, 4)]
    run = {"name": name, "seed": seed, "steps": steps, "loss": loss, "curve": curve}
    return run | {"bits_per_byte": loss / 2, "train_loss": [9.0] * (steps - 1) + [loss]}


def write(path: Path, *runs: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))


def test_every_recipe_has_a_run_that_computes_with_it(tmp_path: Path) -> None:
    recipes = set()
    for name in RUNS:
        config = loss_gates.run_config(name, 1, 10, str(tmp_path), tmp_path)
        assert isinstance(check_config(config, world_size=1), Config)
        recipe = chosen_recipe(config)
        recipes.add(recipe.name)
        if name == "quartet_stochastic":
            roundings = {op: getattr(recipe, op).rounding for op in OPERANDS}
            assert [op for op in OPERANDS if roundings[op] == "nearest"] == [
                "forward_input",
                "forward_weight",
            ]
    assert recipes == {*linear_recipes(), "luq"}


def test_gaps_are_to_bf16_of_the_same_seed_and_steps(tmp_path: Path) -> None:
    runs = [
        finished("bf16", 1, 2.0),
        finished("bf16", 2, 4.0),
        finished("mxfp4", 1, 2.1),
        finished("mxfp4", 2, 4.0),
        finished("mxfp4", 3, 9.0),
        finished("luq", 1, 3.0, steps=8),
    ]
    found = {(run["name"], run["seed"]): run["gap"] for run in comparable(runs)}
    expected = {("bf16", 1): 0.0, ("bf16", 2): 0.0, ("mxfp4", 1): 0.05, ("mxfp4", 2): 0.0}
    assert found == pytest.approx(expected)
    assert "| mxfp4 | 2 | 3.0500 | 1.5250 | +2.50 | +5.00, +0.00 | +2.50 |" in table(runs)


def test_finished_runs_are_not_made_again_and_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "runs.json", tmp_path / "picture.png"
    write(path, finished("bf16", 1, 2.0), finished("mxfp8", 1, 2.01))
    options = ["--json", str(path), "--runs", "bf16", "mxfp8", "--seeds", "1", "--steps", "4"]
    assert main(options) == 0
    assert len(read_runs(path)) == 2
    assert "| mxfp8 | 1 | 2.0100 | 1.0050 | +0.50 | +0.50 | +0.50 |" in capsys.readouterr().out
    assert main([*options, "--plot", str(picture)]) == 0
    pixels = imread(picture)[..., :3]
    assert pixels.std() > 0.01


def test_a_run_trains_and_reports(ranks: Ranks, tmp_path: Path) -> None:
    (run,) = ranks.run(1, one_run, make_corpus(tmp_path), megatron=True)
    assert [point["step"] for point in run["curve"]] == [1, 2]
    assert run["loss"] == run["curve"][-1]["loss"] < run["curve"][0]["loss"]
    assert run["precision"] == {"recipe": "luq"}
    assert len(run["train_loss"]) == 2
    assert run["bits_per_byte"] > 0


def one_run(corpus: Path) -> dict[str, Any]:
    return loss_gates.train("luq", seed=1, steps=2, corpus=corpus, eval_tokens=2000)
