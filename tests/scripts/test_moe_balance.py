"""The benchmark of balance losses: what it runs is what it says, and its report is right."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from megatron_ext.config_check import check_config
from megatron_ext.config_file import check_tree
from scripts.bench import domain_texts, moe_balance
from scripts.bench.domain_texts import DOMAINS, prepare_domains
from scripts.bench.moe_balance import (
    KINDS,
    differences,
    main,
    mean_and_spread,
    read_run,
    run_name,
    settings,
    summarise,
)

NUM_EXPERTS, NUM_LAYERS = 6, 2


def finished_run(folder: Path, kind: str, seed: int, *, loss: float) -> None:
    """A run folder as training leaves it."""
    run_dir = folder / "runs" / run_name(kind, 0.01, seed)
    run_dir.mkdir(parents=True)
    record: dict[str, Any] = {
        "step": 1,
        "total_tokens": 4096,
        "step_seconds": 0.5,
        "expert_load_max_over_mean": [1.5, 2.0],
    }
    last = record | {
        "step": 2,
        "validation_loss": loss,
        "validation_bits_per_byte": loss / 2,
        "validation_expert_specialisation": [0.25, 0.75],
        "validation_expert_top_share": [0.5, 0.5],
    }
    lines = (json.dumps(line) + "\n" for line in (record, last))
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    experts = {
        "domains": list(DOMAINS),
        "layers": [0, 1],
        "specialisation": [0.25, 0.75],
        "counts": [[[3 + seed] * NUM_EXPERTS] * len(DOMAINS)] * NUM_LAYERS,
    }
    (run_dir / "experts.json").write_text(json.dumps(experts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, loss in ((1, 3.0), (2, 3.2)):
        finished_run(tmp_path, "global", seed, loss=loss)
        finished_run(tmp_path, "micro", seed, loss=loss + 0.1 * seed)
    finished_run(tmp_path, "none", 1, loss=3.5)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_a_configuration(kind: str) -> None:
    corpora = {name: Path(name) for name in DOMAINS}
    tree = settings(corpora, Path("run"), kind=kind, coefficient=0.1, seed=3, num_ranks=2)
    config = check_config(check_tree(tree, where="test"), world_size=2)
    assert config.data.domains == DOMAINS
    # A micro-batch is no longer than one piece of one document, and a step has many.
    assert config.data.micro_batch_tokens == config.data.max_sequence_length
    assert config.train.global_batch_tokens == 16 * config.data.micro_batch_tokens
    expected = {} if kind == "none" else {KINDS[kind]: 0.1}
    assert config.balance_coefficients == expected


def test_a_run_is_read_when_it_is_finished(folder: Path) -> None:
    run_dir = folder / "runs" / run_name("global", 0.01, 1)
    found = read_run(run_dir)
    assert found is not None
    assert (found["kind"], found["coefficient"], found["seed"]) == ("global", 0.01, 1)
    assert found["specialisation"] == 0.5
    assert found["load_max_over_mean"] == 2.0
    assert found["train_seconds"] == 1.0
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text(lines[0])
    assert read_run(run_dir) is None
    assert read_run(folder / "runs" / "nowhere") is None


def test_differences_are_seed_by_seed() -> None:
    runs = [
        {"kind": kind, "coefficient": 0.1, "seed": seed} | dict.fromkeys(moe_balance.FIGURES, value)
        for kind, seed, value in (
            ("global", 1, 1.0),
            ("micro", 1, 1.5),
            ("global", 2, 3.0),
            ("micro", 2, 3.5),
            ("global", 3, 99.0),
        )
    ]
    (delta,) = differences(runs)
    # Seeds differ much more than kinds; a seed without its partner says nothing.
    assert delta["seeds"] == 2
    assert delta["validation_loss"] == [-0.5, 0.0]
    rows = summarise(runs)
    assert [(row["kind"], row["seeds"]) for row in rows] == [("global", 3), ("micro", 2)]
    assert rows[1]["validation_loss"] == pytest.approx([2.5, math.sqrt(2)])
    assert mean_and_spread([1.0]) == [1.0, None]


def test_table_json_and_picture(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report, picture = folder / "report.json", folder / "experts.png"
    arguments = ["--folder", str(folder), "--only", "global:1", "none:1"]
    arguments += ["--json", str(report), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["moe_balance", *arguments])
    main()
    printed = capsys.readouterr().out
    assert "| global | 0.01 | 2 | 3.1000 +- 0.1414 |" in printed
    assert "| global - micro | 0.01 | 2 | -0.1500 +- 0.0707 |" in printed
    # One seed has no spread.
    assert "| none | 0 | 1 | 3.5000 | " in printed
    assert "nan" not in printed

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    found = json.loads(report.read_text(), parse_constant=refuse)
    assert len(found["runs"]) == 5
    (alone,) = (row for row in found["summary"] if row["kind"] == "none")
    assert alone["validation_loss"] == [3.5, None]
    assert imread(picture).std() > 0.01


def test_what_is_not_a_run_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moe_balance", "--folder", str(folder), "--only", "all:1"])
    with pytest.raises(SystemExit):
        main()


def test_domains_have_one_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {}
    for number, name in enumerate(DOMAINS):
        texts[name] = tmp_path / "texts" / name
        texts[name].mkdir(parents=True)
        for document in range(40):
            text = f"{name} {number} document {document} says something\n" * 30
            (texts[name] / f"{document}.txt").write_text(text)
    monkeypatch.setattr(domain_texts, "fetch_texts", lambda folder: texts)
    from megatron_ext.data.corpus import Corpus

    opened = [Corpus.open(path) for path in prepare_domains(tmp_path, vocab_size=300).values()]
    assert len({corpus.tokenizer.fingerprint for corpus in opened}) == 1
    assert [corpus.path.name for corpus in opened] == [f"{name}-300" for name in DOMAINS]
    for corpus in opened:
        assert corpus.train.num_documents + corpus.validation.num_documents == 40
