"""A number that is not finite on one rank is every rank's affair, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.checkpoint import folder
from megatron_ext.metrics import read_metrics
from tests.megatron_ext.tiny_run import opened, tiny_tree
from tests.rank_pool import Ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {"use_distributed_optimizer": False},
    "DP2+ZeRO-1": {},
    "DP2+ZeRO-1 overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
}
BAD_RANK = 1


class BadStep:
    """While a run is in one of `steps`, a gradient of rank 1 becomes `value`."""

    def __init__(self, run: Any, *, steps: set[int], value: float, where: str = "gradient") -> None:
        self.run = run
        self.steps = steps
        self.value = value
        if dist.get_rank() != BAD_RANK:
            return
        name, parameter = next(
            (name, parameter)
            for name, parameter in run.chunks[0].named_parameters()
            if name.endswith("linear_fc1.weight")
        )
        if where == "gradient":
            # One entry of this rank's own gradient, before it meets the others'.
            parameter.register_hook(self.spoil)
        else:
            module = run.chunks[0].get_submodule(name.removesuffix(".weight"))
            module.register_forward_hook(lambda *call: (self.spoil(call[2][0]), None))

    def spoil(self, tensor: Tensor) -> Tensor:
        if self.run.step + 1 not in self.steps:
            return tensor
        spoilt = tensor.clone()
        spoilt.view(-1)[0] = self.value
        return spoilt


def train_with_bad_step(tree: dict[str, Any], options: dict[str, Any]) -> str:
    """What ends a run with a bad step, as text; the run saves after every step."""
    from megatron_ext.trainer import NonFiniteError, train

    with opened(tree) as run:
        BadStep(run, **options)
        try:
            train(run)
        except NonFiniteError as error:
            return str(error)
    return "it did not end"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_on_one_rank_stops_all_and_nothing_is_saved(
    ranks: Ranks, corpus: Path, tmp_path: Path, layout: str
) -> None:
    tree = tiny_tree(
        corpus,
        tmp_path / "run",
        parallel=LAYOUTS[layout],
        checkpoint={"save_interval": 1},
        train={"train_iters": 5, "global_batch_tokens": 1024},
        model={"num_layers": 2},
    )
    options = {"steps": {3}, "value": float("nan")}
    first, second = ranks.run(2, train_with_bad_step, tree, options, megatron=True)
    assert first == second
    assert first.startswith("step 3: loss ")
    assert "gradient norm nan: not finite, so nothing was applied or saved" in first
    assert "lower optim.lr, raise optim.lr_warmup_iters, or set train.nonfinite=skip" in first
    run_dir = tmp_path / "run"
    assert [step for step, _ in folder.complete_checkpoints(run_dir)] == [1, 2]
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"value": float("inf")},
        {"value": -float("inf")},
        {"value": float("nan"), "where": "activation"},
        {"value": float("inf"), "where": "activation"},
    ],
    ids=["gradient inf", "gradient -inf", "activation nan", "activation inf"],
)
def test_whatever_is_not_finite_stops_both_ranks(
    ranks: Ranks, corpus: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    tree = tiny_tree(corpus, tmp_path / "run", model={"num_layers": 1})
    first, second = ranks.run(2, train_with_bad_step, tree, {"steps": {1}} | options, megatron=True)
    assert first == second
    assert "step 1: loss " in first
    assert "not finite, so nothing was applied or saved" in first
    assert folder.complete_checkpoints(tmp_path / "run") == []


def everything(run: Any) -> list[Tensor]:
    """Copies of all that an update may change: weights, main weights, moments, Adam's counts."""
    part = run.optimizer.chained_optimizers[0]
    tensors = [parameter for chunk in run.chunks for parameter in chunk.parameters()]
    for group in part.optimizer.param_groups:
        for main in group["params"]:
            state = part.optimizer.state.get(main, {})
            tensors += [main, *(state[key] for key in sorted(state))]
    return [tensor.detach().clone() for tensor in tensors]


def skip_and_go_on(tree: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Five steps, of which the third is bad."""
    from megatron_ext.trainer import save, train_step

    with opened(tree) as run:
        BadStep(run, **options)
        records = [train_step(run), train_step(run)]
        before = everything(run)
        records.append(train_step(run))
        unchanged = list(map(torch.equal, before, everything(run)))
        records.append(train_step(run))
        changed = [not torch.equal(x, y) for x, y in zip(before, everything(run), strict=True)]
        save(run)
        records.append(train_step(run))
        weights = [parameter.detach().clone() for parameter in run.chunks[0].parameters()]
    return {"records": records, "unchanged": unchanged, "changed": changed, "weights": weights}


def resume_and_step(tree: dict[str, Any]) -> dict[str, Any]:
    from megatron_ext.resume import resume
    from megatron_ext.trainer import train_step

    with opened(tree) as run:
        resume(run)
        records = [train_step(run)]
        weights = [parameter.detach().clone() for parameter in run.chunks[0].parameters()]
    return {"records": records, "weights": weights}


@pytest.mark.parametrize(
    ("optimizer", "dtype", "where"),
    [
        ("adam", "fp32", "gradient"),
        ("adam", "bf16", "activation"),
        ("lion", "fp32", "activation"),
        ("lion", "bf16", "gradient"),
    ],
)
def test_skipping_counts_and_leaves_no_trace(
    ranks: Ranks, corpus: Path, tmp_path: Path, optimizer: str, dtype: str, where: str
) -> None:
    tree = tiny_tree(
        corpus,
        tmp_path / "run",
        train={"train_iters": 20, "global_batch_tokens": 1024, "nonfinite": "skip"},
        precision={"dtype": dtype},
        optim={"optimizer": optimizer, "lr": 1e-3},
        model={"num_layers": 1},
    )
    options = {"steps": {3}, "value": float("nan"), "where": where}
    reports = ranks.run(2, skip_and_go_on, tree, options, megatron=True)
    for report in reports:
        assert all(report["unchanged"])
        # The next step is an ordinary one; only norms of heads may be too small to move in bf16.
        assert sum(report["changed"]) > 0.5 * len(report["changed"])
        records = report["records"]
        assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1]
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
        norms = [record["grad_norm"] for record in records]
        assert [norm == norm for norm in norms] == [True, True, False, True, True]
        if where == "gradient":
            assert all(record["loss"] < 6.5 for record in records)
    # A run that comes back after it does not count the skipped step as an update.
    for report, resumed in zip(
        reports, ranks.run(2, resume_and_step, tree, megatron=True), strict=True
    ):
        for key in ("loss", "grad_norm", "skipped_steps", "total_tokens"):
            assert resumed["records"][0][key] == report["records"][-1][key]
        assert all(map(torch.equal, resumed["weights"], report["weights"]))


def test_too_many_skipped_steps_in_a_row_end_the_run(
    ranks: Ranks, corpus: Path, tmp_path: Path
) -> None:
    tree = tiny_tree(
        corpus,
        tmp_path / "run",
        train={
            "train_iters": 20,
            "global_batch_tokens": 1024,
            "nonfinite": "skip",
            "max_skipped_steps": 1,
        },
        model={"num_layers": 1},
        checkpoint={"save_interval": 3},
    )
    # One alone is allowed twice; two in a row are not.
    options = {"steps": {2, 4, 6, 7}, "value": float("nan")}
    first, second = ranks.run(2, train_with_bad_step, tree, options, megatron=True)
    assert first == second
    assert "step 7: 2 steps in a row were not finite (train.max_skipped_steps=1)" in first
    assert [step for step, _ in folder.complete_checkpoints(tmp_path / "run")] == [3, 6]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert '"grad_norm": null' in lines[1]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 2, 2, 3]
