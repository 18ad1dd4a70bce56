"""A killed run that is started again equals one that was never killed; any layout may go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.megatron_ext.layout_settings import PLAIN, PP2, TP2
from tests.megatron_ext.test_bad_input import train_here
from tests.megatron_ext.tiny_run import opened, tiny_tree, whole_tensors
from tests.rank_pool import RankError, Ranks

NUM_STEPS = 12
SAVE_INTERVAL = 3
# Small buckets, so that the distributed optimizer has several: megatron's own format loses
# elements then.
BUCKETS = {
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "ddp_bucket_size": 4000,
}

COMPARED = ("step", "loss", "learning_rate", "grad_norm", "tokens", "total_tokens")


def write_config(folder: Path, corpus: Path, **sections: dict[str, Any]) -> Path:
    tree = tiny_tree(
        corpus,
        folder / "run",
        train={
            "train_iters": NUM_STEPS,
            "global_batch_tokens": 1024,
            "eval_interval": 6,
            "eval_tokens": 500,
        },
        model={"num_layers": 2},
        checkpoint={"save_interval": SAVE_INTERVAL, "keep": 2},
        **sections,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def job_command(config: Path, num_ranks: int) -> list[str]:
    return [sys.executable, "-m", "megatron_ext", "train", str(config), "--ranks", str(num_ranks)]


def one_thread_each() -> dict[str, str]:
    """As in the test run's own ranks: how many threads there are changes the order of sums."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(config: Path, num_ranks: int) -> str:
    done = subprocess.run(
        job_command(config, num_ranks),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=one_thread_each(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(config: Path) -> list[dict[str, Any]]:
    lines = (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the ranks that a launcher started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def kill_a_rank_after(config: Path, *, step: int, num_ranks: int, delay_seconds: float) -> None:
    """Start a run and kill -9 one of its ranks some time after it has logged `step`."""
    path = config.parent / "run" / "metrics.jsonl"
    with subprocess.Popen(
        job_command(config, num_ranks),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=one_thread_each(),
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if path.exists() and len(path.read_text().splitlines()) >= step:
                break
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        time.sleep(delay_seconds)
        os.kill(random.choice(ranks_of(process)), signal.SIGKILL)
        assert process.wait(timeout=60) == 128 + signal.SIGKILL


def final_state(tree: dict[str, Any]) -> dict[str, Any]:
    """Weights, optimizer state and the next sequences of a run folder, read by its own code."""
    from megatron_ext.optimizer import main_parameter
    from megatron_ext.resume import resume

    with opened(tree) as run:
        resume(run)
        part = run.optimizer.chained_optimizers[0]
        moments: list[Tensor] = []
        for chunk in run.chunks:
            for parameter in chunk.parameters():
                held = main_parameter(part, parameter)
                if held is not None:
                    entry = part.optimizer.state[held[0]]
                    moments += [
                        held[0].detach().clone(),
                        *(entry[key].clone() for key in sorted(entry)),
                    ]
        weights = whole_tensors(run, "weight")
        refs, lengths = run.data.next_step(1024)
    return {
        "weights": weights,
        "moments": moments,
        "next": [(ref.corpus, ref.sequence) for ref in refs],
        "lengths": lengths,
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kill_and_resume_is_bit_equal(
    ranks: Ranks, corpus: Path, tmp_path: Path, dtype: str
) -> None:
    precision = {"dtype": dtype}
    whole = write_config(tmp_path / "whole", corpus, precision=precision)
    killed = write_config(tmp_path / "killed", corpus, precision=precision)
    ranks.run(2, train_here, yaml.safe_load(whole.read_text()), megatron=True)
    # Anywhere in a step, also while a checkpoint is being written.
    step = random.randint(1, NUM_STEPS - 6)
    kill_a_rank_after(killed, step=step, num_ranks=2, delay_seconds=random.uniform(0, 0.05))
    output = run(killed, 2)
    assert ("going on after step" if step > SAVE_INTERVAL else "start") in output
    kept = [[record[key] for key in COMPARED] for record in metrics(killed)]
    assert kept == [[record[key] for key in COMPARED] for record in metrics(whole)], (
        f"killed at {step}"
    )
    states = [
        ranks.run(2, final_state, yaml.safe_load(config.read_text()), megatron=True)
        for config in (whole, killed)
    ]
    for expected, found in zip(*states, strict=True):
        assert found["next"] == expected["next"]
        assert found["lengths"] == expected["lengths"]
        assert all(
            torch.equal(found["weights"][name], expected["weights"][name])
            for name in expected["weights"]
        )
        assert all(map(torch.equal, found["moments"], expected["moments"]))


def save_in(tree: dict[str, Any]) -> list[float]:
    return train_save_train(tree, 2, 1)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"norm_position": "reordered"}},
        {"model": {"untie_embeddings_and_output_weights": False, "qk_layernorm": False}},
        {"optim": {"optimizer": "lion", "lr": 3e-4}},
    ],
    ids=["reordered norm", "tied embeddings", "lion"],
)
def test_options_resume_on_another_layout(
    ranks: Ranks, corpus: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    first = tiny_tree(corpus, tmp_path / "run", parallel=TP2, **sections)
    second = tiny_tree(corpus, tmp_path / "run", parallel=PP2, **sections)
    expected = ranks.run(2, save_in, first, megatron=True)[0]
    for losses in ranks.run(2, resume_train, second, 1, megatron=True):
        assert losses == pytest.approx(expected, abs=1e-5)


def test_another_model_or_optimizer_is_refused(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    ranks.run(1, save_in, tiny_tree(corpus, tmp_path / "run"), megatron=True)
    for sections, words in (
        ({"model": {"rotary_base": 500000.0}}, "model.rotary_base: 10000.0 there, 500000.0 here"),
        ({"model": {"qk_layernorm": False}}, "model.qk_layernorm: True there, False here"),
        ({"optim": {"optimizer": "lion"}}, "optim.optimizer=adam"),
    ):
        tree = tiny_tree(corpus, tmp_path / "run", **sections)
        with pytest.raises(RankError, match=words):
            ranks.run(1, resume_train, tree, 1, megatron=True)


def step_loss(run: Any) -> float:
    """One step; its loss."""
    from megatron_ext.trainer import train_step

    loss = train_step(run)["loss"]
    assert isinstance(loss, float)
    return loss


def start_and_count(tree: dict[str, Any]) -> tuple[int, float]:
    """Adam's count of updates after one step of a run that starts from another."""
    from megatron_ext.checkpoint.state import num_updates
    from megatron_ext.resume import resume

    with opened(tree) as run:
        resume(run)
        assert run.step == 0
        loss = step_loss(run)
        return num_updates(run.optimizer), loss


def test_start_from_another_run(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    ranks.run(1, save_in, tiny_tree(corpus, tmp_path / "first"), megatron=True)
    tree = tiny_tree(
        corpus,
        tmp_path / "second",
        checkpoint={"load": str(tmp_path / "first"), "save_interval": 0},
    )
    ((updates, loss),) = ranks.run(1, start_and_count, tree, megatron=True)
    assert updates == 3
    (fresh,) = ranks.run(1, resume_train, tiny_tree(corpus, tmp_path / "none"), 1, megatron=True)
    assert loss < fresh[0]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, TP2), (2, PP2)),
        ((2, {}), (1, {})),
        ((1, {}), (2, TP2 | {"sequence_parallel": True})),
        ((2, PP2 | {"virtual_pipeline_model_parallel_size": 2}), (2, {})),
        ((2, PLAIN), (1, {})),
        ((2, BUCKETS), (2, TP2 | PLAIN)),
    ],
    ids=["TP2-PP2", "DP2-DP1", "1-TP2+SP", "VPP-DP2", "plain-ZeRO", "buckets-TP2"],
)
def test_resume_on_another_layout(
    ranks: Ranks,
    corpus: Path,
    tmp_path: Path,
    before: tuple[int, dict[str, Any]],
    after: tuple[int, dict[str, Any]],
) -> None:
    run_dir = tmp_path / "run"
    (num_before, parallel_before), (num_after, parallel_after) = before, after
    first = tiny_tree(corpus, run_dir, parallel=parallel_before)
    second = tiny_tree(corpus, run_dir, parallel=parallel_after)
    expected = ranks.run(num_before, train_save_train, first, 4, 3, megatron=True)[0]
    found = ranks.run(num_after, resume_train, second, 3, megatron=True)
    for losses in found:
        for loss, wanted in zip(losses, expected, strict=True):
            assert abs(loss - wanted) <= 1e-5


def train_save_train(tree: dict[str, Any], num_before: int, num_after: int) -> list[float]:
    """Train, save, train on; the losses after the save."""
    from megatron_ext.trainer import save, train_step

    with opened(tree) as run:
        for _ in range(num_before):
            train_step(run)
        save(run)
        return [step_loss(run) for _ in range(num_after)]


def resume_train(tree: dict[str, Any], num_steps: int) -> list[float]:
    from megatron_ext.resume import resume

    with opened(tree) as run:
        resume(run)
        return [step_loss(run) for _ in range(num_steps)]


def save_without_room_for_rank_0(tree: dict[str, Any]) -> None:
    """Save twice; at the second time rank 0 cannot write the file that it writes alone."""
    import errno

    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    from megatron_ext.trainer import save, train_step

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tree) as run:
        train_step(run)
        save(run)
        train_step(run)
        original = TorchCommonSaveStrategy.save_common
        if dist.get_rank() == 0:
            TorchCommonSaveStrategy.save_common = full
        try:
            save(run)
        finally:
            # This process goes on to the next test.
            TorchCommonSaveStrategy.save_common = original


def test_rank_0_does_not_wait_for_others_when_its_disk_is_full(
    ranks: Ranks, corpus: Path, tmp_path: Path
) -> None:
    tree = tiny_tree(corpus, tmp_path / "run")
    # The other rank waits inside megatron; that rank 0 leaves with the reason ends it.
    with pytest.raises(RankError, match=r"is full .*iter_0000001") as raised:
        ranks.run(2, save_without_room_for_rank_0, tree, megatron=True)
    assert raised.value.rank == 0
