"""What forward kept, for a backward pass that is cut elsewhere.

The same rows arrive at a rank whichever way its group cuts, only in another order. Each token's
number travels the legs of both ways, and rows with equal numbers are the same row. Rows sorted by
expert then follow: choice j of an arrived row is choice j of that row in both orders.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.route import Route
from moe.permutation import inverse
from moe.schedule.chunks import cut
from moe.schedule.expert_steps import Kept

# More than tokens of one rank.
_RANK_STRIDE = 1 << 40


def regroup(
    kept: Sequence[Kept], routes: Sequence[Route], wanted: Sequence[Route], *, num_tokens: int
) -> list[Kept]:
    """`kept` of the chunks of `routes`, as chunks of `wanted`.

    Every rank of the group calls this together.

    Args:
        num_tokens: of this rank, before they travel.
    """
    here = _arrived_numbers(routes, num_tokens, kept[0].arrived.device)
    there = _arrived_numbers(wanted, num_tokens, kept[0].arrived.device)
    # Row i of all `wanted` is row `same[i]` of all `routes`.
    same = torch.cat(here).argsort()[inverse(torch.cat(there).argsort())]
    width = routes[0].weights.shape[1]
    row_of_choice = _rows_of_choices(routes, width)
    arrived = torch.cat([chunk.arrived for chunk in kept])
    gate_up = torch.cat([chunk.gate_up for chunk in kept])
    results = []
    for route, source in zip(
        wanted, torch.split(same, [len(numbers) for numbers in there]), strict=True
    ):
        choices = route.permutation.choices
        sources = source[choices // width] * width + choices % width
        results.append(
            Kept(
                arrived=arrived.index_select(0, source),
                gate_up=gate_up.index_select(0, row_of_choice[sources]),
            )
        )
    return results


def _arrived_numbers(
    routes: Sequence[Route], num_tokens: int, device: torch.device
) -> list[Tensor]:
    """For each chunk int64 [num arrived]: numbers that no two tokens of any ranks share."""
    first = dist.get_rank() * _RANK_STRIDE
    numbers = torch.arange(first, first + num_tokens, device=device)[:, None]
    results = []
    for route, part in zip(routes, cut(num_tokens, len(routes)), strict=True):
        travelling = numbers[part]
        for leg in route.legs:
            travelling = leg.start(travelling, "numbers").wait()
        results.append(travelling[:, 0])
    return results


def _rows_of_choices(routes: Sequence[Route], width: int) -> Tensor:
    """int64 [num arrived * width], over all chunks: the row of each choice; anything nowhere."""
    first_row = 0
    rows = []
    for route in routes:
        choices = route.permutation.choices
        own = torch.zeros(route.weights.shape[0] * width, dtype=torch.int64, device=choices.device)
        own[choices] = torch.arange(first_row, first_row + len(choices), device=choices.device)
        rows.append(own)
        first_row += len(choices)
    return torch.cat(rows)
