"""On a real device: streams and pinned memory. Equality, memory given up, no wait on the host."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from parallel.offload.link import StreamLink, open_link
from parallel.offload.offload import Offload
from parallel.offload.shuttle import Shuttle
from tests.parallel.offload.small_net import WIDTH, Net

pytestmark = pytest.mark.gpu
LAYERS, TOKENS = 8, 1 << 17


def step(
    net: Net, x: Tensor, table: Tensor, offload: Offload | None, ratio: float
) -> tuple[list[Tensor], int]:
    """Gradients, and the bytes that are allocated after forward."""
    net.zero_grad()
    x.grad = None
    with contextlib.ExitStack() as stack:
        watched = None
        if offload is not None:
            watched = stack.enter_context(
                offload.forward_pass(ratio, num_tokens=[TOKENS], shared=[table])
            )
        loss = net(x, table, watched).square().mean()
    held = torch.cuda.memory_allocated()
    loss.backward()
    grads = [x.grad, *(weight.grad for weight in net.parameters())]
    return [grad.clone() for grad in grads if grad is not None], held


def test_equals_no_offload_and_frees_memory() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    net = Net(LAYERS).to(device)
    x = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    table = torch.randn(TOKENS, WIDTH, device=device)
    link = open_link(device)
    assert isinstance(link, StreamLink)
    assert link.host_bytes(16).is_pinned()
    offload = Offload(
        Shuttle(device, link=link, page_bytes=1 << 20),
        num_layers=LAYERS,
        weights=net.parameters(),
    )
    wanted, held = step(net, x, table, None, 0.0)
    for ratio in (0.3, 1.0, 0.5, 1.0):
        for _ in range(3):
            found, less = step(net, x, table, offload, ratio)
            assert all(map(torch.equal, found, wanted)), f"ratio {ratio}"
            count = offload.end_step()
            # What leaves last may be on its way still when forward ends.
            assert held - less >= 0.8 * count.offloaded_bytes * (LAYERS - 3) / (LAYERS - 2)
            assert count.offloaded_bytes > 0
