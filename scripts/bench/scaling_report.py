"""What a scaling measurement says: efficiency, table, picture. Pure arithmetic.

With S(n) tokens a second on n ranks, u(n) the units that compute (GPUs: n; CPU ranks of one thread:
min(n, cores), for more ranks than cores share them) and n0 the fewest ranks measured:

    efficiency(n) = (S(n) / u(n)) / (S(n0) / u(n0))

Weak scaling gives every rank the same tokens a step, strong scaling all ranks together. MFU is the
model's FLOP/s of all ranks over u(n) times the peak that one rank of the smallest run had to
itself: a peak measured while ranks share a core would flatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODES = ("weak", "strong")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One mode on one number of ranks, as measured."""

    mode: str
    num_ranks: int
    num_units: int
    """GPUs, or cores in use."""
    tokens_per_step: int
    step_seconds: float
    """Median."""
    model_flops_per_second: float
    """Of all ranks together."""
    peak_flops_per_rank: float
    peak_memory_bytes: int
    """Of the fullest rank."""
    predicted_tokens_per_second: float
    """By `megatron-ext plan`; ranks that share a core, with so much less of it."""
    device: str
    measured_on: str
    """Date."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A point beside the smallest of its mode."""

    point: Point
    efficiency: float
    per_rank_efficiency: float
    """The same with u(n) = n: what one sees where ranks share cores."""
    mfu: float


def num_units(num_ranks: int, *, num_cores: int | None) -> int:
    """num_cores: of the machine for CPU ranks; None where every rank has a GPU."""
    return num_ranks if num_cores is None else min(num_ranks, num_cores)


def rows(points: Sequence[Point], mode: str) -> list[Row]:
    """In the order of ranks."""
    chosen = sorted((p for p in points if p.mode == mode), key=lambda point: point.num_ranks)
    if not chosen:
        return []
    first = chosen[0]
    return [
        Row(
            point=point,
            efficiency=_speed(point, point.num_units) / _speed(first, first.num_units),
            per_rank_efficiency=_speed(point, point.num_ranks) / _speed(first, first.num_ranks),
            mfu=point.model_flops_per_second / (point.num_units * first.peak_flops_per_rank),
        )
        for point in chosen
    ]


def merge(old: Sequence[Point], new: Sequence[Point]) -> list[Point]:
    """A point measured again takes the place of the old one."""
    by_key = {(point.mode, point.num_ranks): point for point in (*old, *new)}
    return [by_key[key] for key in sorted(by_key)]


def table(points: Sequence[Point]) -> str:
    lines = [
        "| scaling | ranks | units | tokens a step | tokens/s | predicted | efficiency | per rank "
        "| MFU | memory of the fullest rank |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        for row in rows(points, mode):
            point = row.point
            lines.append(
                f"| {mode} | {point.num_ranks} | {point.num_units} | {point.tokens_per_step:,} "
                f"| {point.tokens_per_second:,.0f} | {point.predicted_tokens_per_second:,.0f} "
                f"| {row.efficiency:.1%} "
                f"| {row.per_rank_efficiency:.1%} | {row.mfu:.1%} "
                f"| {point.peak_memory_bytes / 2**20:,.0f} MiB |"
            )
    return "\n".join(lines)


def to_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [
        asdict(row.point)
        | {
            "tokens_per_second": row.point.tokens_per_second,
            "efficiency": row.efficiency,
            "per_rank_efficiency": row.per_rank_efficiency,
            "mfu": row.mfu,
        }
        for mode in MODES
        for row in rows(points, mode)
    ]


def from_json(entries: Sequence[dict[str, Any]]) -> list[Point]:
    from dataclasses import fields

    names = [field.name for field in fields(Point)]
    return [Point(**{name: entry[name] for name in names}) for entry in entries]


def plot(points: Sequence[Point], path: Path) -> None:
    """Tokens a second and efficiency over ranks; shaded where ranks share cores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.0), layout="constrained")
    for mode, colour in zip(MODES, ("#1f6f8b", "#c8553d"), strict=True):
        found = rows(points, mode)
        if not found:
            continue
        ranks = [row.point.num_ranks for row in found]
        left.plot(ranks, [r.point.tokens_per_second for r in found], "o-", color=colour, label=mode)
        left.plot(
            ranks,
            [r.point.predicted_tokens_per_second for r in found],
            "x",
            color=colour,
            label=f"{mode}, predicted",
        )
        first = found[0].point
        left.plot(
            ranks,
            [_speed(first, first.num_units) * row.point.num_units for row in found],
            ":",
            color=colour,
            label=f"{mode}, ideal",
        )
        right.plot(ranks, [100 * r.efficiency for r in found], "o-", color=colour, label=mode)
    for axes, title in ((left, "tokens/s"), (right, "efficiency per unit, %")):
        all_ranks = sorted({point.num_ranks for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(all_ranks, [str(ranks) for ranks in all_ranks])
        axes.set_xlabel("ranks")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        shared = [point.num_units for point in points if point.num_units < point.num_ranks]
        if shared:
            axes.axvspan(
                max(shared), max(all_ranks), color="#888888", alpha=0.12, label="ranks share cores"
            )
        axes.legend(fontsize=8)
    figure.suptitle(points[0].device.partition(";")[0], fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _speed(point: Point, divisor: int) -> float:
    return point.tokens_per_second / divisor
