"""A plan as a picture: what each rank computes, and when."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

from parallel.plan.operations import Compute
from parallel.plan.records import StepPlan
from parallel.plan.simulate import Simulation

# More rows than this cannot be told apart.
_MOST_ROWS = 256


def plot_plan(plan: StepPlan, simulation: Simulation, path: Path) -> None:
    """Draw a row for each rank and stage, a bar for each micro-batch, by its longest sequence.

    Bars are wide as they last; their colour is the length of the longest sequence in them, and
    what ranks share is framed. White is waiting.
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LogNorm

    step = max(1, -(-len(simulation.timelines) // _MOST_ROWS))
    timelines = simulation.timelines[::step]
    holders = _num_holders(plan)
    bars, lengths, is_shared = [], [], []
    for row, timeline in enumerate(timelines):
        for operation, start, end in zip(
            timeline.operations, timeline.start_seconds, timeline.end_seconds, strict=True
        ):
            if not isinstance(operation, Compute) or end <= start:
                continue
            pieces = plan.micro_batches[timeline.rank][operation.index].pieces
            if not pieces:
                continue
            bars.append(
                [(start, row + 0.08), (end, row + 0.08), (end, row + 0.92), (start, row + 0.92)]
            )
            lengths.append(max(plan.lengths[piece.sequence] for piece in pieces))
            is_shared.append(any(holders[piece.sequence] > 1 for piece in pieces))
    figure, axes = plt.subplots(figsize=(11, min(12.0, 2.2 + 0.16 * len(timelines))))
    colours = PolyCollection(
        bars,
        array=np.array(lengths, dtype=float),
        norm=LogNorm(max(1, min(lengths, default=1)), max(2, *lengths, 2)),
        cmap="viridis_r",
        edgecolors=["black" if shared else "white" for shared in is_shared],
        linewidths=0.5 if len(timelines) <= 64 else 0.2,
    )
    axes.add_collection(colours)
    axes.set_xlim(0, simulation.step_seconds)
    axes.set_ylim(len(timelines), 0)
    axes.set_xlabel("seconds")
    stages = len({timeline.stage for timeline in simulation.timelines})
    every = f", every {step}th shown" if step > 1 else ""
    axes.set_ylabel(("rank" if stages == 1 else f"rank x {stages} stages") + every)
    axes.set_title(
        f"{len(plan.lengths):,} sequences, {plan.num_tokens:,} tokens on {plan.num_ranks:,} ranks: "
        f"{simulation.idle_share:.1%} idle (black frame: shared by several ranks)"
    )
    figure.colorbar(colours, ax=axes, label="longest sequence, tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _num_holders(plan: StepPlan) -> list[int]:
    """For each sequence, the micro-batches that hold a piece of it."""
    holders = [0] * len(plan.lengths)
    for batches in plan.micro_batches:
        for batch in batches:
            for sequence in {piece.sequence for piece in batch.pieces}:
                holders[sequence] += 1
    return holders
