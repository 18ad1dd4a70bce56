"""metrics.jsonl is a contract: its keys, a line a step, and what a crash or a NaN leaves in it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_ext.checkpoint import folder
from megatron_ext.errors import UserError
from megatron_ext.metrics import JsonLines, Record, read_metrics
from megatron_ext.plots import plot_loss
from tests.megatron_ext.tiny_run import make_corpus, opened, tiny_tree
from tests.rank_pool import Ranks

# The contract of the design page.
KEYS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "model_tflops",
    "mfu",
    "peak_memory_bytes",
    "plan_efficiency",
}
VALIDATION_KEYS = {"validation_loss", "validation_bits_per_byte"}


def train_here(tree: dict[str, Any]) -> None:
    from megatron_ext.trainer import train

    with opened(tree) as run:
        train(run)


@pytest.fixture(scope="module")
def run_dir(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went to step 3, lost what it saved there, came back from step 2, ended at 5."""
    home = tmp_path_factory.mktemp("metrics")
    corpus = make_corpus(home)
    for num_ranks, train_iters in ((1, 3), (2, 5)):
        tree = tiny_tree(
            corpus,
            home / "run",
            train={
                "train_iters": train_iters,
                "global_batch_tokens": 1024,
                "eval_interval": 2,
                "eval_tokens": 500,
            },
            checkpoint={"save_interval": 2},
            model={"num_layers": 1},
        )
        ranks.run(num_ranks, train_here, tree, megatron=True)
        shutil.rmtree(folder.checkpoint_path(home / "run", 3), ignore_errors=True)
    return home / "run"


def test_every_step_has_the_keys_of_the_contract(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="ascii").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    for record in records:
        assert set(record) >= KEYS
        assert all(isinstance(record[key], int | float) for key in KEYS), record
        # Step 3 was the last of the first run only, which validated it; that line is gone.
        assert (set(record) >= VALIDATION_KEYS) == (record["step"] in (2, 4, 5))
    for record in records:
        assert 0 < record["tokens"] <= 1024
        assert record["peak_memory_bytes"] > 100e6
        # Step and bound are sums in different order.
        assert 0 < record["plan_efficiency"] <= 1 + 1e-9
        assert 0 <= record["padding_share"] < 1
        assert record["bytes_sent"] == record["offloaded_bytes"] == 0
        assert record["tokens_per_second"] > 0
        assert record["model_tflops"] > 0
        assert 0 < record["mfu"] < 1
        assert 0 < record["loss"] < math.log(257) + 1
    total = 0
    for record in records:
        total += record["tokens"]
        assert record["total_tokens"] == total
    last = records[-1]
    # Bytes are the tokens: the same sum in bits, but the ends of documents are no bytes.
    assert last["validation_bits_per_byte"] > last["validation_loss"] / math.log(2)


def test_the_picture_is_a_picture(run_dir: Path) -> None:
    path = run_dir / "plots" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    height, width, _ = pixels.shape
    assert width >= 600
    assert height >= 400
    # An empty sheet has one colour; curves, axes and their smooth edges have many.
    colours = np.unique((pixels.reshape(height * width, -1) * 255).astype(np.uint8), axis=0)
    assert len(colours) > 50


def test_no_picture_without_steps(tmp_path: Path) -> None:
    assert plot_loss(tmp_path) is None


def records(*steps: int) -> list[Record]:
    return [{"step": step, "loss": 1.0 / step} for step in steps]


def write(path: Path, records: list[Record], *, after_step: int = 0) -> None:
    sink = JsonLines(path, after_step=after_step)
    for record in records:
        sink.write(record)
    sink.close()


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, records(1, 2, 3, 4, 5))
    write(path, records(4), after_step=3)
    assert read_metrics(path) == records(1, 2, 3, 4)
    write(path, [], after_step=4)
    assert read_metrics(path) == records(1, 2, 3, 4)
    write(path, records(1), after_step=0)
    assert read_metrics(path) == records(1)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, after_step=0)
    for number, record in enumerate(records(1, 2, 3), start=1):
        sink.write(record)
        assert len(read_metrics(path)) == number
    sink.close()


def test_a_full_disk_is_a_message(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", after_step=0)
    with Path("/dev/full").open("a") as full:
        sink._stream = full
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written .*No space left"):
            sink.write({"step": 1})
        sink.close()


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record: Record = {"step": 1, "loss": math.nan, "grad_norm": math.inf, "mfu": -math.inf}
    write(path, [record])
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "grad_norm": None, "mfu": None}
    assert "NaN" not in path.read_text()


def test_plot_has_room_for_missing_numbers(tmp_path: Path) -> None:
    lines: list[Record] = [
        {
            "step": step,
            "total_tokens": 100 * step,
            "loss": None if step == 2 else 3.0 / step,
            "learning_rate": 1e-3,
            "grad_norm": None if step == 3 else 1.0,
        }
        for step in range(1, 5)
    ]
    write(tmp_path / "metrics.jsonl", lines)
    path = plot_loss(tmp_path)
    assert path is not None
    assert path.stat().st_size > 5000


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, records(1, 2, 3))
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    found = read_metrics(path)
    # Without its line end alone the last line is still whole.
    assert found == records(1, 2, 3)[: 3 if cut == 1 else 2]
    write(path, records(3), after_step=2)
    assert read_metrics(path) == records(1, 2, 3)


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"loss": 3}', "", "\u00ff not UTF-8"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n', encoding="latin-1")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a metrics record"):
        read_metrics(path)
