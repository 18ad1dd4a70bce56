"""A small residual net for tests of offload: its layers save what transformer layers save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.offload.forward_pass import ForwardPass
from parallel.offload.offload import Offload

WIDTH = 32


class Layer(nn.Module):
    """Saves: a tensor used twice, three views of one storage, outputs, weights, a shared table."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        left, middle, right = self.mixed(x).chunk(3, dim=-1)
        gate = torch.tanh(left * middle + torch.tanh(right) * table)
        result: Tensor = self.out(gate * gate) + x
        return result


class Net(nn.Module):
    def __init__(self, num_layers: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.to(dtype)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        watched: ForwardPass | None,
        *,
        first_layer: int = 0,
        recompute: bool = False,
    ) -> Tensor:
        for index, layer in enumerate(self.layers, start=first_layer):
            if watched is not None:
                watched.begin_layer(index)
            x = checkpoint(layer, x, table, use_reentrant=True) if recompute else layer(x, table)
        return x


@dataclass(frozen=True)
class MicroBatch:
    num_tokens: int
    ratio: float


def inputs(batch: MicroBatch, *, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch.num_tokens, WIDTH, generator=generator).to(dtype)
    table = torch.randn(batch.num_tokens, WIDTH, generator=generator).to(dtype)
    return x.requires_grad_(), table


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def run_step(
    net: Net,
    batches: Sequence[MicroBatch],
    *,
    offload: Offload | None,
    order: Sequence[tuple[str, int]] | None = None,
    recompute: bool = False,
) -> list[Tensor]:
    """Losses, gradients of the inputs and of the weights.

    Args:
        order: ("forward" or "backward", micro-batch) in the order of running; by default all
            forward, then all backward.
    """
    net.zero_grad()
    count = range(len(batches))
    order = order or [*(("forward", i) for i in count), *(("backward", i) for i in count)]
    losses: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}
    dtype = next(net.parameters()).dtype
    for direction, index in order:
        if direction == "backward":
            losses[index].backward()  # type: ignore[no-untyped-call]
            continue
        batch = batches[index]
        leaves[index], table = inputs(batch, seed=index, dtype=dtype)
        with contextlib.ExitStack() as stack:
            watched = None
            if offload is not None:
                watched = stack.enter_context(
                    offload.forward_pass(
                        batch.ratio, num_tokens=[batch.num_tokens], shared=[table], name=index
                    )
                )
            output = net(leaves[index], table, watched, recompute=recompute)
        losses[index] = output.float().square().mean()
    grads = [leaves[index].grad for index in count]
    grads += [parameter.grad for parameter in net.parameters()]
    assert all(grad is not None for grad in grads)
    return [
        *(losses[i].detach() for i in count),
        *(grad.clone() for grad in grads if grad is not None),
    ]
