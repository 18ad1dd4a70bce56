"""The training loop of one rank.

`train` says when, `train_step` is the one step. What is printed, drawn and saved stands around the
step, not in it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext import exit_codes
from megatron_ext.checkpoint import checkpoint, folder
from megatron_ext.config_file import dump_config
from megatron_ext.console import TrainConsole
from megatron_ext.devices import peak_memory_bytes
from megatron_ext.errors import UserError
from megatron_ext.expert_domains import EXPERTS_FILE
from megatron_ext.expert_metrics import expert_metrics
from megatron_ext.expert_plot import plot_experts
from megatron_ext.learning_rate import learning_rate
from megatron_ext.metrics import Record, open_sinks
from megatron_ext.optimizer import clip_and_step, set_learning_rate
from megatron_ext.plan_agreement import agree_on_plan
from megatron_ext.plan_metrics import plan_metrics
from megatron_ext.plots import plot_loss
from megatron_ext.requests import Requests, listening
from megatron_ext.resume import resume
from megatron_ext.run import Run
from megatron_ext.sample import sample
from megatron_ext.step import StepSums, gather_parameters, run_micro_batches
from megatron_ext.summary import summary
from megatron_ext.validation import validate
from parallel.plan.flops import model_flops

# Trimming the heap costs page faults in the step after it; not trimming costs memory.
_RELEASE_MEMORY_INTERVAL = 8


class NonFiniteError(UserError):
    """Training produced a loss or gradient that is not finite; nothing of it was kept."""


def train(run: Run, *, early_signals: Sequence[int] = ()) -> int:
    """Train from where the run folder stands to the end, or to a request to stop.

    Args:
        early_signals: those that arrived while the rank started up.

    Returns:
        `exit_codes.DONE` or `exit_codes.SAVED_AND_STOPPED`.
    """
    config, console = run.config, run.console
    for line in summary(run):
        console.say(line)
    resume(run)
    sinks = (
        open_sinks(config.log, run.run_dir, after_step=run.step) if run.mesh.is_first_rank else []
    )
    console.begin(run.step)
    reason = None
    saved_step = run.step
    with (
        contextlib.ExitStack() as stack,
        listening(run.run_dir, reads_files=run.mesh.is_first_rank, early=early_signals) as requests,
    ):
        for sink in sinks:
            stack.callback(sink.close)
        stack.callback(console.end)
        while run.step < config.train.train_iters and reason is None:
            record = train_step(run)
            if run.step % _RELEASE_MEMORY_INTERVAL == 0:
                run.device.release_memory()
            is_last = run.step == config.train.train_iters
            if is_last or _is_due(run.step, config.train.eval_interval):
                record |= validate(run)
                run.device.release_memory()
            reason, is_save_wanted = _agreed(run, record, requests)
            for sink in sinks:
                sink.write(record)
            console.step(record)
            _say_validation(console, record)
            is_save_due = _is_due(run.step, config.checkpoint.save_interval)
            if is_last or reason or is_save_wanted or is_save_due:
                save(run)
                saved_step = run.step
                requests.note_saved()
    if reason is not None and saved_step < config.train.train_iters:
        requests.note_stopped()
        console.say(f"asked to stop by {reason}: saved step {saved_step}; same command to go on")
        return exit_codes.SAVED_AND_STOPPED
    finish(run)
    return exit_codes.DONE


def train_step(run: Run) -> Record:
    """One optimizer step over the next global batch.

    Returns:
        The numbers of this step, the same on every rank.
    """
    config, began = run.config, time.perf_counter()
    prepared = run.loader.take(is_last=run.step + 1 >= config.train.train_iters)
    plan = prepared.plan
    agree_on_plan(prepared.digest, device=run.device.device)
    if config.parallel.planner != "packing":
        # Gathering inside the first forward waits for all ranks, and one of them may first have to
        # meet another in its second micro-batch.
        gather_parameters(run.chunks)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    if run.balance is not None:
        run.balance.begin_step(run.step)
    if run.low_precision is not None:
        run.low_precision.begin_step(run.step)
    if run.compression is not None:
        run.compression.begin_step(run.step)
    if run.traffic is not None:
        run.traffic.begin_step()
    sums = run_micro_batches(
        run.chunks,
        prepared.batches,
        reader=run.reader,
        z_loss_coeff=config.model.z_loss_coeff,
        offload=run.offload,
    )
    rate = learning_rate(run.step, config.optim, train_iters=config.train.train_iters)
    set_learning_rate(run.optimizer, rate, weight_decay=config.optim.weight_decay)
    grad_norm, is_updated = _update(run, sums)
    run.step += 1
    run.tokens += sums.num_tokens
    run.skipped_steps += int(not is_updated)
    run.device.synchronize()
    record = _record(run, sums, plan.lengths, rate, grad_norm, time.perf_counter() - began)
    record |= plan_metrics(prepared, sums)
    if run.balance is not None:
        record |= expert_metrics(run.balance.step.counts, run.balance.step.demand)
        record |= run.balance.losses(sums.num_tokens)
        if run.traffic is not None:
            record |= run.traffic.metrics(run.balance.step.rank_counts)
    if run.compression is not None:
        record |= run.compression.metrics()
    return record


def _update(run: Run, sums: StepSums) -> tuple[float, bool]:
    """Apply the gradients if they and the loss are finite; all ranks decide alike."""
    if math.isfinite(sums.loss_sum):
        grad_norm, is_updated = clip_and_step(run.optimizer, clip_grad=run.config.optim.clip_grad)
    else:
        grad_norm, is_updated = math.nan, False
    run.skipped_in_a_row = 0 if is_updated else run.skipped_in_a_row + 1
    if is_updated and run.balance is not None:
        run.balance.end_step()
    train = run.config.train
    if not is_updated and train.nonfinite == "stop":
        raise NonFiniteError(
            f"step {run.step + 1}: loss {sums.mean}, gradient norm {grad_norm}: not finite, so "
            "nothing was applied or saved; lower optim.lr, raise optim.lr_warmup_iters, or set "
            "train.nonfinite=skip"
        )
    if run.skipped_in_a_row > train.max_skipped_steps:
        raise NonFiniteError(
            f"step {run.step + 1}: {run.skipped_in_a_row} steps in a row were not finite "
            f"(train.max_skipped_steps={train.max_skipped_steps}); the last checkpoint is good"
        )
    return grad_norm, is_updated


def _record(
    run: Run,
    sums: StepSums,
    lengths: Sequence[int],
    rate: float,
    grad_norm: float,
    seconds: float,
) -> Record:
    flops_per_device = model_flops(run.shape, lengths=lengths) / seconds / run.mesh.world_size
    return {
        "step": run.step,
        "loss": sums.mean,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "tokens": sums.num_tokens,
        "total_tokens": run.tokens,
        "step_seconds": seconds,
        "tokens_per_second": sums.num_tokens / seconds,
        "model_tflops": flops_per_device / 1e12,
        "mfu": flops_per_device / run.device.peak_flops,
        "skipped_steps": run.skipped_steps,
    }


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _agreed(run: Run, record: Record, requests: Requests) -> tuple[str | None, bool]:
    """Share the largest memory peak and what was asked for; the same answer on every rank.

    Returns:
        Who asked to stop, or None; whether to save.
    """
    reason = requests.stop_reason
    shared = torch.tensor(
        [
            float(reason is not None),
            float(requests.is_save_wanted),
            float(peak_memory_bytes(run.device)),
        ],
        dtype=torch.float64,
        device=run.device.device,
    )
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    is_stop, is_save_wanted, record["peak_memory_bytes"] = (int(value) for value in shared.tolist())
    return ((reason or "another rank") if is_stop else None), bool(is_save_wanted)


def _say_validation(console: TrainConsole, record: Record) -> None:
    if "validation_loss" in record:
        console.say(
            f"          held out: loss {record['validation_loss']:.4f}, "
            f"{record['validation_bits_per_byte']:.4f} bits per byte"
        )


def save(run: Run) -> None:
    """Write a checkpoint of this moment; every rank calls this."""
    began = time.perf_counter()
    gather_parameters(run.chunks)
    path = checkpoint.save_checkpoint(
        run.run_dir,
        run.state(),
        chunks=run.chunks,
        optimizer=run.optimizer,
        config_yaml=dump_config(run.config),
        tokenizer=run.data.tokenizer,
        keep=run.config.checkpoint.keep,
        mesh=run.mesh,
    )
    run.console.say(f"          saved {path} ({time.perf_counter() - began:.1f} s)")


def finish(run: Run) -> None:
    """The last words of a run: a sample, where things are."""
    log = run.config.log
    plots = _draw(run.run_dir) if run.mesh.is_first_rank else []
    if log.sample_prompt is not None:
        text = sample(
            run.chunks,
            run.reader,
            run.data.tokenizer,
            prompt=log.sample_prompt,
            num_tokens=log.sample_tokens,
            max_sequence_length=run.config.data.max_sequence_length,
        )
        run.console.say(f"\nsample:\n{text}\n")
    if run.mesh.is_first_rank:
        for plot in plots:
            run.console.say(f"plot        {plot}")
        run.console.say(f"metrics     {run.run_dir / 'metrics.jsonl'}")
        run.console.say(f"checkpoint  {folder.checkpoint_path(run.run_dir, run.step)}")


def _draw(run_dir: Path) -> list[Path]:
    loss = plot_loss(run_dir)
    experts = plot_experts(run_dir / EXPERTS_FILE, run_dir / "plots" / "experts.png")
    return [path for path in (loss, experts) if path is not None]
