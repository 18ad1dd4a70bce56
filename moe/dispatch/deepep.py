"""The one door to DeepEP, whose kernels move tokens over NVLink and RDMA; nothing else imports it.

What it does is one leg of ours in fused kernels: a token goes once to each rank that wants it (and
once to each node, if ranks are on several), expert numbers and weights go along, copies are summed
on the way home. So a trip is the same: arrive, permute, experts, sum with weights, home.

Chosen by name only. NOT RUN by this project's tests: they have no machine with DeepEP. Written
after its interface (`deep_ep.Buffer`, 1.1 and 1.2) and megatron-core's use of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.exact import share_evenly
from moe.dispatch.hooks import Hooks
from moe.dispatch.route import Choices, end_route
from moe.dispatch.trip import RouteTrip
from moe.permutation import permute, unpermute
from moe.records import Routing
from parallel.optional_library import Availability, import_library


@cache
def has_deep_ep() -> Availability:
    """Import DeepEP once and say what came of it."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return Availability(False, "DeepEP needs an NVIDIA GPU")
    return import_library(
        "deep_ep",
        "DeepEP",
        how="github.com/deepseek-ai/DeepEP",
        needs="Buffer",
        hint="version 1 has",
    )


@dataclass(frozen=True, slots=True)
class DeepEPTrip:
    """See `moe.dispatch.protocol.Trip`."""

    trip: RouteTrip
    buffer: Any
    handle: Any

    @property
    def rows(self) -> Tensor:
        return self.trip.rows

    @property
    def counts(self) -> Tensor:
        return self.trip.counts

    def combine(self, outputs: Tensor) -> Tensor:
        answers = unpermute(outputs, self.trip.weights, self.trip.route.permutation)
        answers = self.trip.hooks.before_combine(answers)
        return _Home.apply(answers, self.buffer, self.handle)  # type: ignore[no-any-return, no-untyped-call]


class DeepEPDispatcher:
    """For ranks of an NCCL group on NVIDIA GPUs that share the experts evenly; bfloat16 rows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def dispatch(self, tokens: Tensor, routing: Routing, hooks: Hooks) -> DeepEPTrip:
        """Every rank of the group calls this together, also with no tokens.

        Raises:
            ValueError: the rows are not bfloat16, or the experts cannot be shared evenly.
        """
        if tokens.dtype != torch.bfloat16:
            raise ValueError(f"DeepEP moves bfloat16 rows, these are {tokens.dtype}")
        num_local = share_evenly(routing.num_experts, self.group.size())
        buffer = _buffer_of(self.group, tokens.element_size() * tokens.shape[1])
        # Its nowhere is -1.
        experts = routing.experts.masked_fill(routing.experts == routing.num_experts, -1)
        found: dict[str, Any] = {}
        rows, weights = _Out.apply(  # type: ignore[no-untyped-call]
            tokens, routing.weights, experts, routing.num_experts, buffer, found
        )
        counts = found["counts"]
        route = end_route(
            (),
            Choices(experts=found["experts"].to(torch.int64), weights=weights.detach()),
            first_expert=0,
            counts=torch.tensor(counts, dtype=torch.int64, device=rows.device),
            num_rows=sum(counts),
        )
        assert len(counts) == num_local
        if route.columns is not None:
            weights = weights.gather(1, route.columns)
        arrived = permute(hooks.after_dispatch(rows), route.permutation)
        trip = RouteTrip(rows=arrived, weights=weights, route=route, hooks=hooks)
        return DeepEPTrip(trip, buffer, found["handle"])


@cache
def _buffer_of(group: dist.ProcessGroup, row_bytes: int) -> Any:
    """One for all layers: it is large."""
    from deep_ep import Buffer

    size = group.size()
    configs = (Buffer.get_dispatch_config(size), Buffer.get_combine_config(size))
    return Buffer(
        group,
        max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs),
        max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs),
    )


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        experts: Tensor,
        num_experts: int,
        buffer: Any,
        found: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        to_rank, to_node, to_expert, is_in_rank, _ = buffer.get_dispatch_layout(
            experts, num_experts
        )
        rows, arrived, arrived_weights, counts, handle, _ = buffer.dispatch(
            tokens.contiguous(),
            topk_idx=experts,
            topk_weights=weights.float(),
            num_tokens_per_rank=to_rank,
            num_tokens_per_rdma_rank=to_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=to_expert,
        )
        found.update(experts=arrived, counts=counts, handle=handle)
        ctx.buffer, ctx.handle = buffer, handle
        return rows, arrived_weights

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, _ = ctx.buffer.combine(
            grad_rows.contiguous(), ctx.handle, topk_weights=grad_weights.float()
        )
        return tokens, weights, None, None, None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, answers: Tensor, buffer: Any, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        home: Tensor = buffer.combine(answers.contiguous(), handle)[0]
        return home

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None
