"""One line a step: `metrics.jsonl` is the source of truth, TensorBoard and W&B are copies of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron_ext.config import LogConfig
from megatron_ext.errors import UserError

Record = dict[str, float | int | list[float] | None]
"""A list has an entry for each layer that has experts."""


def step_of(record: Record) -> int:
    """The step that a record is of."""
    step = record["step"]
    assert isinstance(step, int)
    return step


class Sink(Protocol):
    """Something that takes the numbers of a step."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: a line a step, on disk when `write` returns."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Keep the lines up to `after_step`: a run that died had gone past its checkpoint."""
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= after_step]
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        temporary.replace(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        try:
            self._stream.write(_line(record))
            self._stream.flush()
        except OSError as error:
            # Closing would try to write the rest once more, and hide this.
            with contextlib.suppress(OSError):
                self._stream.close()
            raise UserError(
                f"{self.path}: cannot be written ({error}); make room and run the same command "
                "again: it goes on from the newest checkpoint"
            ) from None

    def close(self) -> None:
        self._stream.close()


def _line(record: dict[str, Any]) -> str:
    # NaN is not JSON; a reader gets null.
    clean = {
        key: [_finite(entry) for entry in value] if isinstance(value, list) else _finite(value)
        for key, value in record.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: Record) -> Iterator[tuple[str, float | int | None]]:
    """The figures of a record one by one: entry i of a list is named KEY/i."""
    for key, value in record.items():
        if isinstance(value, list):
            yield from ((f"{key}/{index}", entry) for index, entry in enumerate(value))
        else:
            yield key, value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a last line cut by a crash is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                f"{path}: line {number} is not a metrics record: {line[:80]!r}"
            ) from None
        records.append(record)
    return records


class TensorBoard:
    """Event files below the run folder; the door to `tensorboard`."""

    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard=true needs the tensorboard package: "
                "pip install 'megatron-ext[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, record: Record) -> None:
        for key, value in _scalars(record):
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; the door to `wandb`. WANDB_MODE=offline works without a network."""

    def __init__(self, run_dir: Path, project: str) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "log.wandb_project needs the wandb package: pip install 'megatron-ext[wandb]'"
            ) from None
        # The same folder is the same W&B run, however often it is resumed.
        run_id = hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=8).hexdigest()
        self._run = wandb.init(
            project=project, dir=str(run_dir), name=run_dir.name, id=run_id, resume="allow"
        )

    def write(self, record: Record) -> None:
        self._run.log(dict(_scalars(record)), step=step_of(record))

    def close(self) -> None:
        self._run.finish()


def open_sinks(log: LogConfig, run_dir: Path, *, after_step: int) -> list[Sink]:
    """The sinks that the configuration asks for."""
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl", after_step=after_step)]
    if log.tensorboard:
        sinks.append(TensorBoard(run_dir))
    if log.wandb_project:
        sinks.append(WandB(run_dir, log.wandb_project))
    return sinks
