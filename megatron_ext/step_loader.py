"""The next step's plan and rows, prepared in the background while a step runs.

Lengths first: all ranks make the plan of the whole global batch from the lengths alone; each then
reads only its own pieces from the memory-mapped corpus. What is prepared ahead and never used (a
run that stops) leaves no trace, because the place in the data that a checkpoint keeps is the one
behind the last step that was *taken*.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from megatron_ext.batch import HostBatch
from megatron_ext.config import Config
from megatron_ext.data.order import Cursor
from megatron_ext.planners import plan_step
from megatron_ext.run_costs import RunCosts
from megatron_ext.training_data import BatchReader, TrainingData
from parallel.plan.predict import predict
from parallel.plan.records import StepPlan


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """All that a step needs from the host."""

    plan: StepPlan
    digest: str
    """Of the plan and the corpora, for `agree_on_plan`."""
    efficiency: float
    """How close the plan is to the best that any could do, by the cost model."""
    batches: list[HostBatch]
    cursor: Cursor
    """The place in the data behind this step."""


class StepLoader:
    """Prepares steps one ahead.

    Not started before the first `take`, so that a resumed run may seek first.
    """

    def __init__(
        self,
        data: TrainingData,
        reader: BatchReader,
        config: Config,
        *,
        costs: RunCosts,
        is_ahead: bool = True,
    ) -> None:
        self._data = data
        self._reader = reader
        self._config = config
        self._costs = costs
        self._worker = ThreadPoolExecutor(1, "step-loader") if is_ahead else None
        self._next: Future[PreparedStep] | None = None
        self._cursor: Cursor | None = None

    @property
    def cursor(self) -> Cursor:
        """The place in the data behind the last step taken."""
        return self._cursor or self._data.order.cursor

    def seek(self, cursor: Cursor) -> None:
        """Go on behind `cursor`; nothing has been taken yet."""
        assert self._next is None, "seek before the first step"
        self._data.order.seek(cursor)

    def take(self, *, is_last: bool = False) -> PreparedStep:
        """The next step; unless it is the last one, the one after it is begun."""
        if self._worker is None:
            step = self._prepare()
        else:
            step = (self._next or self._worker.submit(self._prepare)).result()
            self._next = None if is_last else self._worker.submit(self._prepare)
        self._cursor = step.cursor
        return step

    def close(self) -> None:
        """Forget what was prepared ahead."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)

    def _prepare(self) -> PreparedStep:
        config, mesh = self._config, self._reader.mesh
        assert config.train.global_batch_tokens is not None
        refs, lengths = self._data.next_step(config.train.global_batch_tokens)
        cursor = self._data.order.cursor
        plan = plan_step(lengths, config, num_data_ranks=mesh.data_size, costs=self._costs)
        return PreparedStep(
            plan=plan,
            digest=_digest(plan, self._data),
            efficiency=predict(
                plan,
                self._costs.cost_model,
                num_pipeline_stages=mesh.pipeline_size,
                expert_parallel_size=config.parallel.num_expert_data_ranks,
            ).efficiency,
            batches=self._reader.read(plan, refs, self._data.train),
            cursor=cursor,
        )


def _digest(plan: StepPlan, data: TrainingData) -> str:
    # Other texts of the same lengths make the same plan.
    return hashlib.sha256(f"{plan.digest()} {data.fingerprint}".encode()).hexdigest()
