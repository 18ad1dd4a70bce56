"""Before a step, all ranks make sure that they are about to run the same plan.

Ranks that follow different plans would wait for each other for ever, or exchange the wrong tokens.
A plan is a pure function of lengths, configuration and cost model, so a difference means that the
ranks see different data, files or software. One reduction of two numbers tells; only then are the
digests gathered, to say who differs.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist

from megatron_ext.errors import UserError


def agree_on_plan(digest: str, *, device: torch.device) -> None:
    """Compare the digest of the step's plan over all ranks; every rank calls this.

    Raises:
        UserError: on every rank, naming the ranks whose plan differs from that of the most.
    """
    # 60 bits: the number and its negative both fit an int64.
    number = int(digest[:15], 16)
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, negative_smallest = extremes.tolist()
    if largest == -negative_smallest:
        return
    mine = torch.tensor([number], dtype=torch.int64, device=device)
    numbers = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(numbers, mine)
    found = numbers.tolist()
    most, _ = Counter(found).most_common(1)[0]
    others = [rank for rank, other in enumerate(found) if other != most]
    raise UserError(
        f"ranks {', '.join(map(str, others))} planned this step differently from the others: they "
        "see another corpus, configuration, cost profile or version of megatron-ext; make these "
        "the same on all hosts"
    )
