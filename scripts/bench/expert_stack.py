"""A stack of expert layers on each rank, timed: forward, backward, and exchanges of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.records import Routing
from moe.router import router_logits, softmax_topk

Layer = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]
"""See `moe.schedule.serial.ExpertPath`."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What runs on every rank."""

    hosts: int = 2
    ranks_per_host: int = 1
    mbit: float = 200.0
    layers: int = 2
    tokens: int = 2048
    hidden_size: int = 512
    ffn_size: int = 1024
    experts: int = 8
    topk: int = 2
    steps: int = 5
    chunks: tuple[int, ...] = ()
    """Numbers of chunks to try besides the chosen one."""
    ways: tuple[str, ...] = ("exact", "hierarchical", "lsh", "lsh int8")
    directions: int = 64
    """Tokens scatter round so many directions; similar ones are what compression finds."""
    scatter: float = 0.3
    skew: float = 0.3
    """Direction i has i^-skew of the tokens."""
    num_hashes: int = 2
    hash_dim: int = 16
    expected_rate: float = 0.25
    """What compression is expected to send, for the choice of chunks."""


@dataclass(slots=True)
class Stopwatch:
    """Seconds of each exchange, where it is waited for at once."""

    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count every all-to-all of this process."""
        original = dist.all_to_all_single

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            work = original(*args, **kwargs)
            self.seconds.append(time.perf_counter() - began)
            return _Timed(work, self, len(self.seconds) - 1) if work is not None else None

        dist.all_to_all_single = timed
        try:
            yield
        finally:
            dist.all_to_all_single = original


@dataclass(slots=True)
class _Timed:
    work: Any
    stopwatch: Stopwatch
    number: int

    def wait(self) -> None:
        began = time.perf_counter()
        self.work.wait()
        self.stopwatch.seconds[self.number] += time.perf_counter() - began


@dataclass(slots=True)
class Stack:
    """The layers of one rank."""

    shape: Shape
    tokens: Tensor
    routers: list[Tensor] = field(default_factory=list)
    experts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def draw(cls, shape: Shape) -> Stack:
        everywhere = torch.Generator().manual_seed(0)
        here = torch.Generator().manual_seed(1 + dist.get_rank())
        size, num_local = shape.hidden_size, shape.experts // dist.get_world_size()
        directions = torch.randn(shape.directions, size, generator=everywhere)
        often = torch.arange(1.0, shape.directions + 1) ** -shape.skew
        of_token = often.multinomial(shape.tokens, replacement=True, generator=here)
        scatter = torch.randn(shape.tokens, size, generator=here)
        stack = cls(shape, directions[of_token] + shape.scatter * scatter)
        for _ in range(shape.layers):
            router = torch.randn(shape.experts, size, generator=everywhere) / size**0.5
            fc1 = torch.randn(num_local, 2 * shape.ffn_size, size, generator=here) / size**0.5
            fc2 = torch.randn(num_local, size, shape.ffn_size, generator=here)
            stack.routers.append(router.requires_grad_())
            stack.experts.append(
                (fc1.requires_grad_(), (0.1 * fc2 / shape.ffn_size**0.5).requires_grad_())
            )
        return stack

    def forward(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """What goes in and what comes out."""
        first = hidden = self.tokens.clone().requires_grad_()
        for router, (fc1, fc2) in zip(self.routers, self.experts, strict=True):
            normed = torch.nn.functional.rms_norm(hidden, (hidden.shape[1],))
            routing = softmax_topk(router_logits(normed, router), topk=self.shape.topk)
            hidden = hidden + layer(normed, routing, fc1, fc2)
        return first, hidden

    def backward(self, first: Tensor, last: Tensor) -> list[Tensor]:
        weights = [weight for pair in self.experts for weight in pair]
        leaves = [first, *self.routers, *weights]
        return list(torch.autograd.grad(last, leaves, torch.ones_like(last) / last.numel()))


def measure(stack: Stack, layers: dict[str, Layer]) -> dict[str, dict[str, float]]:
    """Medians of forward and backward of the slowest rank, and what exchanges took of them.

    Layers take turns, so that whatever else the machine does hits all of them. An exchange begins
    when its last rank comes to it: of all ranks the shortest time counts.
    """
    rows: dict[str, list[list[float]]] = {name: [] for name in layers}
    for _ in range(stack.shape.steps + 1):
        for name, layer in layers.items():
            rows[name].append(step(stack, layer))
    report = {}
    for name in layers:
        # The first is a warm-up.
        times = torch.tensor(rows[name][1:], dtype=torch.float64)
        forward, backward, forward_exchange, backward_exchange = times.median(dim=0).values.tolist()
        report[name] = {
            "seconds": float((times[:, 0] + times[:, 1]).median()),
            "forward_seconds": forward,
            "backward_seconds": backward,
            "forward_exchange_seconds": forward_exchange,
            "backward_exchange_seconds": backward_exchange,
        }
    return report


def step(stack: Stack, layer: Layer) -> list[float]:
    """Forward, backward, and exchanges of both."""
    watches = Stopwatch(), Stopwatch()
    dist.barrier()
    began = time.perf_counter()
    with watches[0].watch():
        ends = stack.forward(layer)
    middle = time.perf_counter()
    with watches[1].watch():
        stack.backward(*ends)
    passes = torch.tensor([middle - began, time.perf_counter() - middle], dtype=torch.float64)
    dist.all_reduce(passes, op=dist.ReduceOp.MAX)
    exchanges = []
    for watch in watches:
        seconds = torch.tensor(watch.seconds, dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MIN)
        exchanges.append(float(seconds.sum()))
    return [*passes.tolist(), *exchanges]
