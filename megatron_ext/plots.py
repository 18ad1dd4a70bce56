"""`plots/loss.png`: what a run did, drawn from its metrics file."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.metrics import read_metrics


def plot_loss(run_dir: Path) -> Path | None:
    """Draw training loss, held-out bits per byte, learning rate and gradient norm over tokens.

    Returns:
        Path of the picture, or None when no step has been logged.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(run_dir / "metrics.jsonl")
    if not records:
        return None
    tokens = [record["total_tokens"] / 1e6 for record in records]
    validated = [record for record in records if record.get("validation_loss") is not None]

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    loss = [_number(record["loss"]) for record in records]
    top.plot(tokens, loss, color="0.75", linewidth=0.8, label="training, each step")
    top.plot(tokens, _smooth(loss), color="C0", label="training, smoothed")
    if validated:
        where = [record["total_tokens"] / 1e6 for record in validated]
        held_out = [record["validation_loss"] for record in validated]
        top.plot(where, held_out, "o-", color="C3", markersize=4, label="held out")
        top.annotate(
            f"{validated[-1]['validation_bits_per_byte']:.3f} bits per byte",
            (where[-1], held_out[-1]),
            textcoords="offset points",
            xytext=(0, 28),
            ha="right",
            color="C3",
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "C3"},
        )
    top.set_ylabel("loss (nats per token)")
    top.set_title(run_dir.name)
    top.legend()
    top.grid(alpha=0.3)

    rate = [_number(record["learning_rate"]) for record in records]
    norm = [_number(record["grad_norm"]) for record in records]
    bottom.plot(tokens, rate, color="C2")
    bottom.set_ylabel("learning rate", color="C2")
    bottom.set_xlabel("tokens (millions)")
    bottom.grid(alpha=0.3)
    right = bottom.twinx()
    right.semilogy(tokens, norm, color="0.6", linewidth=0.8)
    right.set_ylabel("gradient norm", color="0.4")

    path = run_dir / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _smooth(values: list[float], *, weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    total, norm, smoothed = 0.0, 0.0, []
    for value in values:
        if value == value:
            total = weight * total + (1 - weight) * value
            norm = weight * norm + (1 - weight)
        smoothed.append(total / norm if norm else float("nan"))
    return smoothed
