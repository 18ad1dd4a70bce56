"""One step of a given plan on random tokens: its loss and its whole gradients, on any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from parallel.plan.records import MicroBatch, Piece, StepPlan
from tests.megatron_ext.tiny_run import opened, whole_tensors


class RandomTexts:
    """Sequences of any length, drawn from their number; reads like a `SequenceIndex`."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths

    def read(
        self, sequence: int, start: int, end: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids = np.random.default_rng(sequence).integers(0, 256, self._lengths[sequence] + 1)
        return ids[start:end], ids[start + 1 : end + 1]


def single_plan(lengths: Sequence[int]) -> StepPlan:
    """Everything on one rank in one micro-batch."""
    pieces = tuple(Piece(index, 0, length) for index, length in enumerate(lengths) if length)
    return StepPlan(
        lengths=tuple(lengths),
        tokens_per_rank=max(1, sum(lengths)),
        micro_batches=((MicroBatch(pieces),),),
    )


def run_plans(tree: dict[str, Any], plans: Sequence[StepPlan]) -> list[tuple[float, Any]]:
    """For each plan (mean loss, whole gradients of this stage by name), on this rank."""
    from megatron_ext.step import run_micro_batches
    from megatron_ext.training_data import SequenceRef

    found: list[tuple[float, dict[str, Tensor]]] = []
    num_bytes_offloaded = 0
    with opened(tree) as run:
        for plan in plans:
            for chunk in run.chunks:
                chunk.zero_grad_buffer()
            run.optimizer.zero_grad()
            refs = [SequenceRef(0, index) for index in range(len(plan.lengths))]
            texts: Any = [RandomTexts(plan.lengths)]
            loss = run_micro_batches(
                run.chunks, run.reader.read(plan, refs, texts), reader=run.reader
            )
            for part in run.optimizer.chained_optimizers:
                part.prepare_grads()
            found.append((loss.mean, whole_tensors(run, "grad")))
            if run.offload is not None:
                num_bytes_offloaded += run.offload.end_step().offloaded_bytes
        assert run.offload is None or num_bytes_offloaded > 0, "nothing was offloaded"
    return found
