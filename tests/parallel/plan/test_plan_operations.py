"""The operation lists: equal to what megatron-core does, and sorted by canonical time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from parallel.errors import PlanError
from parallel.plan.operations import (
    Compute,
    Exchange,
    Operation,
    Transfer,
    canonical_time,
    stage_operations,
)
from tests.rank_pool import Ranks

HIDDEN_SIZE = 2


def test_one_stage_alone_has_no_exchange() -> None:
    assert stage_operations(2, stage=0, num_pipeline_stages=1) == (
        Compute(True, 0),
        Compute(False, 0),
        Compute(True, 1),
        Compute(False, 1),
    )
    assert stage_operations(0, stage=0, num_pipeline_stages=1) == ()


def test_two_stages_by_hand() -> None:
    assert stage_operations(2, stage=0, num_pipeline_stages=2) == (
        Compute(True, 0),
        Exchange(sends=(Transfer(True, 0, 0),)),
        Compute(True, 1),
        Exchange(sends=(Transfer(True, 1, 0),), receives=(Transfer(False, 0, 1),)),
        Compute(False, 0),
        Exchange(receives=(Transfer(False, 1, 1),)),
        Compute(False, 1),
    )


@pytest.mark.parametrize("num_micro_batches", [0, 3, 5])
def test_interleaved_counts_are_multiples(num_micro_batches: int) -> None:
    with pytest.raises(PlanError, match=f"a positive multiple of 4 .* not {num_micro_batches}"):
        stage_operations(num_micro_batches, stage=0, num_pipeline_stages=4, num_model_chunks=2)


def test_interleaving_needs_a_pipeline() -> None:
    with pytest.raises(PlanError, match="two stages or more"):
        stage_operations(2, stage=0, num_pipeline_stages=1, num_model_chunks=2)


# (stages, chunks, micro-batches of one rank and of another), as megatron's schedules take them.
def _schedule(num_stages: int, num_chunks: int, one: int, other: int) -> tuple[int, int, int, int]:
    if num_stages == 1 or num_chunks == 1:
        return num_stages, 1, one, other
    return num_stages, num_chunks, num_stages * (1 + one // 3), num_stages * (1 + other // 3)


schedules = st.builds(
    _schedule, st.integers(1, 6), st.integers(1, 3), st.integers(0, 12), st.integers(0, 12)
)


@given(schedules)
def test_ranks_with_fewer_micro_batches_leave_out_and_change_nothing(
    schedule: tuple[int, int, int, int],
) -> None:
    num_stages, num_chunks, one, other = schedule
    fewer, more = sorted((one, other))
    for stage in range(num_stages):
        short, long = (
            [
                operation
                for operation in stage_operations(
                    count,
                    stage=stage,
                    num_pipeline_stages=num_stages,
                    num_model_chunks=num_chunks,
                )
                if isinstance(operation, Compute)
            ]
            for count in (fewer, more)
        )
        assert short == [step for step in long if step.index < fewer]


@given(schedules)
def test_canonical_time_grows_along_every_list(schedule: tuple[int, int, int, int]) -> None:
    num_stages, num_chunks, count, _ = schedule
    sent: list[Transfer] = []
    received: list[Transfer] = []
    for stage in range(num_stages):
        last: int | None = None
        was_exchange = False
        for operation in stage_operations(
            count, stage=stage, num_pipeline_stages=num_stages, num_model_chunks=num_chunks
        ):
            if isinstance(operation, Exchange):
                assert all(transfer.block % num_stages == stage for transfer in operation.sends)
                sent += operation.sends
                received += operation.receives
            # Both ends of a transfer and all transfers of an exchange have one time.
            (time,) = {
                canonical_time(
                    part,
                    stage=part.block % num_stages if isinstance(part, Transfer) else stage,
                    num_pipeline_stages=num_stages,
                    num_model_chunks=num_chunks,
                )
                for part in _parts(operation)
            }
            # Equal only where all forwards are warm-up and megatron makes two of one exchange.
            is_exchange = isinstance(operation, Exchange)
            assert last is None or last < time or (last == time and was_exchange and is_exchange)
            last, was_exchange = time, is_exchange
    assert len(sent) == len(set(sent)) == 2 * count * (num_stages * num_chunks - 1)
    assert sorted(map(str, sent)) == sorted(map(str, received))


def _parts(operation: Operation) -> tuple[Compute | Transfer, ...]:
    if isinstance(operation, Compute):
        return (operation,)
    return (*operation.sends, *operation.receives)


# (stages, chunks, micro-batches of each data-parallel rank, indices at which all ranks meet)
CASES = [
    (1, 1, (3, 2), (1,)),
    (2, 1, (5, 1), ()),
    (2, 1, (5, 3), (0, 2)),
    (2, 2, (4, 2), ()),
    (2, 2, (6, 2), (0, 1)),
    (4, 1, (2,), ()),
    (4, 1, (6,), ()),
    (4, 2, (4,), ()),
    (4, 2, (8,), ()),
]


@pytest.mark.parametrize(("num_stages", "num_chunks", "counts", "meetings"), CASES)
def test_lists_are_megatrons(
    ranks: Ranks,
    num_stages: int,
    num_chunks: int,
    counts: tuple[int, ...],
    meetings: tuple[int, ...],
) -> None:
    logs = ranks.run(
        num_stages * len(counts),
        run_megatron,
        num_stages,
        num_chunks,
        counts,
        meetings,
        megatron=True,
        timeout_seconds=30.0,
    )
    # The pipeline is megatron's outermost axis.
    for number, log in enumerate(logs):
        stage, rank = divmod(number, len(counts))
        expected = stage_operations(
            counts[rank], stage=stage, num_pipeline_stages=num_stages, num_model_chunks=num_chunks
        )
        assert log == list(expected)


def run_megatron(
    num_stages: int, num_chunks: int, counts: tuple[int, ...], meetings: tuple[int, ...]
) -> list[Operation]:
    """What one rank really does in a step, with activations and gradients that say who they are."""
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.transformer.transformer_config import TransformerConfig

    is_interleaved = num_chunks > 1
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=num_stages,
        virtual_pipeline_model_parallel_size=num_chunks if is_interleaved else None,
        create_gloo_process_groups=False,
    )
    config = TransformerConfig(
        num_layers=num_stages * num_chunks,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=1,
        pipeline_model_parallel_size=num_stages,
        virtual_pipeline_model_parallel_size=num_chunks if is_interleaved else None,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        overlap_p2p_comm=False,
        batch_p2p_comm=not is_interleaved,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    rank = parallel_state.get_data_parallel_rank()
    group = parallel_state.get_data_parallel_group()
    log: list[Operation] = []

    def meet(*what: int) -> None:
        """Exchange among all ranks of this stage; they must be in the same operation."""
        if what[0] in meetings:
            total = torch.tensor(what)
            dist.all_reduce(total, group=group)
            assert total.tolist() == [len(counts) * number for number in what]

    class Step(torch.autograd.Function):
        """Forward and backward of one block; what comes in does not matter, only when."""

        @staticmethod
        def forward(ctx: Any, entry: Tensor, index: int, chunk: int) -> Tensor:
            ctx.index, ctx.chunk = index, chunk
            meet(index, chunk, True)
            log.append(Compute(True, index, chunk))
            return torch.tensor([[[float(index), chunk * num_stages + stage]]])

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
            meet(ctx.index, ctx.chunk, False)
            log.append(Compute(False, ctx.index, ctx.chunk))
            return (
                torch.tensor([[[float(ctx.index), ctx.chunk * num_stages + stage]]]),
                None,
                None,
            )

    class Block(nn.Module):
        model_type = ModelType.encoder_or_decoder

        def __init__(self, chunk: int) -> None:
            super().__init__()
            self.config = config
            self.vp_stage = chunk if is_interleaved else None
            self.chunk = chunk
            self.start = nn.Parameter(torch.zeros(1, 1, HIDDEN_SIZE))
            self.entry: Tensor | None = None

        def set_input_tensor(self, entries: list[Tensor | None]) -> None:
            self.entry = entries[0]

        def forward(self, index: int) -> Any:
            entry = self.start if self.entry is None else self.entry
            return Step.apply(entry, index, self.chunk)  # type: ignore[no-untyped-call]

    communicate = P2PCommunicator._communicate

    def logged(self: Any, **arguments: Any) -> Any:
        arrived = communicate(self, **arguments)
        exchange = Exchange(
            sends=_transfers(
                (True, arguments["tensor_send_next"]), (False, arguments["tensor_send_prev"])
            ),
            receives=_transfers((True, arrived[0]), (False, arrived[1])),
        )
        if exchange != Exchange():
            log.append(exchange)
        return arrived

    P2PCommunicator._communicate = logged
    try:
        get_forward_backward_func()(
            forward_step_func=lambda iterator, block: (
                block(next(iterator)),
                lambda output: (output.sum(), torch.tensor(1, dtype=torch.int), {}),
            ),
            data_iterator=[iter(range(counts[rank])) for _ in range(num_chunks)],
            model=[Block(chunk) for chunk in range(num_chunks)],
            num_microbatches=counts[rank],
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
    finally:
        P2PCommunicator._communicate = communicate
    return log


def _transfers(*tensors: tuple[bool, Tensor | None]) -> tuple[Transfer, ...]:
    return tuple(
        Transfer(is_forward, *map(int, tensor.flatten().tolist()))
        for is_forward, tensor in tensors
        if tensor is not None
    )
