"""Measures what the planners' cost model needs, on the ranks and the model of a configuration.

Three constants of a rank's time, forward and backward, over micro-batches of known lengths:

    seconds = a sum_i s_i^2 + b sum_i s_i + g

by non-negative least squares over relative errors, and two of its link, from messages between
neighbours that all ranks send at once: seconds = latency + bytes / bandwidth.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext import exit_codes
from megatron_ext.batch import HostBatch, pack
from megatron_ext.cost_profile import CostProfile, subject_of
from megatron_ext.model_shape import stage_shape
from megatron_ext.run import Run
from megatron_ext.step import run_micro_batches
from parallel.comm.exchange import Message
from parallel.plan.communication import RingCost
from parallel.plan.records import Piece
from parallel.plan.rings import RowLayout

_SHORTEST_TOKENS = 128
_MESSAGE_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)


PROFILE_FILE = "cost_profile.json"


def profile(run: Run) -> int:
    """Measure, say what was found, and write it into the run folder; returns the exit code."""
    found = measure(run)
    if run.mesh.is_first_rank:
        path = run.run_dir / PROFILE_FILE
        found.write(path)
        for name in ("quadratic_seconds", "linear_seconds", "fixed_seconds"):
            run.console.say(f"{name:20} {getattr(found, name):.4g}")
        if found.communication is not None:
            link = found.communication
            run.console.say(
                f"link                 {link.bytes_per_second / 1e9:.3g} GB/s, "
                f"{1e6 * link.latency_seconds:.0f} us for the layers of one hop"
            )
        run.console.say(f"written to {path}; use it with parallel.cost_profile={path}")
    return exit_codes.DONE


def measure(run: Run, *, num_repeats: int = 5) -> CostProfile:
    """Measure on this rank; every rank calls this and gets the same answer."""
    packs = _packs(run.config.data.micro_batch_tokens)
    seconds = [_pack_seconds(run, lengths, num_repeats) for lengths in packs]
    for lengths, taken in zip(packs, seconds, strict=True):
        run.console.say(f"{len(lengths):>6} x {lengths[0]:>7,} tokens  {1e3 * taken:>10.2f} ms")
    quadratic, linear, fixed = _fit(packs, seconds)
    device = run.device
    communication = None
    if run.mesh.data_size > 1:
        latency, bytes_per_second = _link(run, num_repeats)
        communication = RingCost.from_model(
            stage_shape(run.config, run.shape),
            bytes_per_second=bytes_per_second,
            latency_seconds=latency,
            bytes_per_element=device.dtype.itemsize,
        )
    return CostProfile(
        subject=subject_of(
            run.config,
            device=device.info.name,
            dtype=str(device.dtype),
            vocab_size=run.shape.vocab_size,
        ),
        quadratic_seconds=quadratic,
        linear_seconds=linear,
        fixed_seconds=fixed,
        communication=communication,
        date=datetime.now(UTC).date().isoformat(),
    )


def _packs(capacity: int) -> list[list[int]]:
    """Lengths of micro-batches: one sequence of each size, and full ones of each size."""
    sizes = []
    size = min(_SHORTEST_TOKENS, capacity)
    while size < capacity:
        sizes.append(size)
        size *= 2
    sizes.append(capacity)
    full = [[size] * (capacity // size) for size in sizes[:-1]]
    return [[size] for size in sizes] + full


def _fit(packs: Sequence[Sequence[int]], seconds: Sequence[float]) -> tuple[float, float, float]:
    """a, b and g; those that would be negative are 0, but a and b not both.

    Without a or b plans could not be compared: where times are noise, they are taken to be tokens.
    """
    terms = np.array(
        [[sum(s * s for s in lengths), sum(lengths), 1.0] for lengths in packs], dtype=np.float64
    )
    taken = np.asarray(seconds)
    kept = [0, 1, 2]
    while True:
        solution, *_ = np.linalg.lstsq(terms[:, kept] / taken[:, None], np.ones_like(taken))
        if (solution >= 0).all():
            break
        kept.pop(int(solution.argmin()))
        if kept == [2]:
            kept = [1]
    constants = np.zeros(3)
    constants[kept] = solution
    return float(constants[0]), float(constants[1]), float(constants[2])


def _pack_seconds(run: Run, lengths: Sequence[int], num_repeats: int) -> float:
    """One micro-batch of one pipeline stage, the mean over ranks of their medians.

    Twice as many micro-batches less as many as there are stages: what a step does once (filling the
    pipeline, reducing gradients) cancels.
    """
    batch = _random_batch(run, lengths)
    stages = run.mesh.pipeline_size

    def once(num_micro_batches: int) -> None:
        for chunk in run.chunks:
            chunk.zero_grad_buffer()
        run_micro_batches(run.chunks, [batch] * num_micro_batches, reader=run.reader)

    fewer = _median_seconds(run, lambda: once(stages), num_repeats)
    more = _median_seconds(run, lambda: once(2 * stages), num_repeats)
    # Noise cannot make a micro-batch take nothing.
    return max((more - fewer) / stages, 0.1 * more / (2 * stages))


def _random_batch(run: Run, lengths: Sequence[int]) -> HostBatch:
    generator = np.random.default_rng(0)
    model = run.config.model
    whole = tuple(Piece(index, 0, length) for index, length in enumerate(lengths))
    texts = [generator.integers(0, run.data.tokenizer.vocab_size, length) for length in lengths]
    return pack(
        [(text, text) for text in texts],
        RowLayout(whole=whole, rings=(), rank=run.mesh.data_rank),
        num_tokens=run.reader.row_length(sum(lengths)),
        head_dim=model.head_dim,
        rotary_base=model.rotary_base,
    )


def _link(run: Run, num_repeats: int) -> tuple[float, float]:
    """(latency in seconds, bytes per second) of one rank's link while all ranks send."""
    mesh, device = run.mesh, run.device.device
    exchange = run.reader.exchange
    following = (mesh.data_rank + 1) % mesh.data_size
    before = (mesh.data_rank - 1) % mesh.data_size
    points = []
    for size in _MESSAGE_BYTES:
        sent = torch.zeros(size, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)

        def once(sent: torch.Tensor = sent, received: torch.Tensor = received) -> None:
            exchange.post(
                [
                    Message(sent, following, is_sent=True),
                    Message(received, before, is_sent=False),
                ]
            ).wait()

        points.append((size, _median_seconds(run, once, 4 * num_repeats)))
        run.console.say(f"{size:>15,} bytes to a neighbour  {1e3 * points[-1][1]:>10.3f} ms")
    sizes = np.array([size for size, _ in points], dtype=np.float64)
    taken = np.array([seconds for _, seconds in points])
    terms = np.stack([np.ones_like(sizes), sizes], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(terms / taken[:, None], np.ones_like(taken))
    if per_byte <= 0 or not math.isfinite(per_byte):
        per_byte = taken[-1] / sizes[-1]
    return max(float(latency), 0.0), 1.0 / float(per_byte)


def _median_seconds(run: Run, once: Callable[[], None], num_repeats: int) -> float:
    """The median of this many runs after a warm-up; the same number on every rank."""
    once()
    taken = []
    for _ in range(num_repeats):
        dist.barrier()
        began = time.perf_counter()
        once()
        run.device.synchronize()
        taken.append(time.perf_counter() - began)
    median = torch.tensor([statistics.median(taken)], dtype=torch.float64, device=run.device.device)
    dist.all_reduce(median)
    return float(median) / dist.get_world_size()
