"""`plots/experts.png`: which experts each domain's held-out tokens chose, a panel a layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_NUM_COLUMNS = 2
_MOST_PANELS = 12
# This many times the even load, and more, has the darkest colour.
_FULL_COLOUR = 4.0
# Numbers of experts are readable up to here.
_MOST_NUMBERED = 64


def plot_experts(counts_file: Path, path: Path, *, title: str = "") -> Path | None:
    """Draw what `expert_domains` wrote.

    Returns:
        `path`, or None where nothing has been counted.
    """
    if not counts_file.exists():
        return None
    tree = json.loads(counts_file.read_text(encoding="utf-8"))
    draw_experts([(title, tree)], path)
    return path


def draw_experts(runs: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Heat maps of domains by experts; with several runs each is a column, with one they wrap.

    The colour of a cell is the share of the domain's choices times the number of experts: 1 (white)
    is an even load. In each panel the experts stand in the order of the domain that uses them most,
    so that domains with experts of their own show as blocks; their numbers stand below.

    Args:
        runs: (title, what `experts.json` holds) of runs with the same layers and domains.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import TwoSlopeNorm

    layers = _shown(len(runs[0][1]["layers"]))
    panels = [(title, tree, layer) for layer in layers for title, tree in runs]
    num_columns = len(runs) if len(runs) > 1 else min(_NUM_COLUMNS, len(layers))
    num_rows = -(-len(panels) // num_columns)
    num_domains, num_experts = np.shape(runs[0][1]["counts"])[1:]
    width, height = max(4.5, 0.16 * num_experts + 2), 0.7 + 0.32 * num_domains
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(width * num_columns + 0.6, height * num_rows + 0.4),
        squeeze=False,
        layout="constrained",
    )
    loads = [relative_loads(np.array(tree["counts"][layer])) for _, tree, layer in panels]
    colours = ScalarMappable(TwoSlopeNorm(1.0, vmin=0.0, vmax=_FULL_COLOUR), cmap="RdBu_r")
    for axis, (title, tree, layer), load in zip(axes.flat, panels, loads, strict=False):
        order = expert_order(load)
        axis.imshow(load[:, order], aspect="auto", cmap=colours.cmap, norm=colours.norm)
        axis.set_yticks(range(num_domains), tree["domains"])
        names = [str(expert) for expert in order] if num_experts <= _MOST_NUMBERED else []
        axis.set_xticks(range(len(names)), names, fontsize=6)
        head = f"{title}, " if title else ""
        axis.set_title(
            f"{head}layer {tree['layers'][layer]}: specialisation "
            f"{tree['specialisation'][layer]:.2f}",
            fontsize=9,
        )
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("experts, those of one domain side by side", fontsize=9)
    figure.colorbar(colours, ax=axes, extend="max", label="load over even load")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def relative_loads(counts: npt.NDArray[Any]) -> Floats:
    """counts [num_domains, num_experts] to each domain's shares over the even share."""
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    loads: Floats = counts / totals * counts.shape[1]
    return loads


def expert_order(loads: Floats) -> list[int]:
    """Experts by the domain that uses them most; within it, those that it uses most first."""
    favourite = loads.argmax(axis=0)
    return [int(expert) for expert in np.lexsort((-loads.max(axis=0), favourite))]


def _shown(num_layers: int) -> list[int]:
    """Layers that get a panel: all, or some evenly between the first and the last."""
    if num_layers <= _MOST_PANELS:
        return list(range(num_layers))
    return [round(place) for place in np.linspace(0, num_layers - 1, _MOST_PANELS)]
