"""Measured costs of a model on a device: the file that `megatron-ext profile` writes.

The file says for which model, layout and device the constants were measured; a run with another
one is told so instead of planning with wrong numbers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.model_shape import model_shape
from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CostProfile:
    """Constants of one rank, and what they were measured on."""

    subject: dict[str, str | int]
    """Model, layout, number format and device (`subject_of`)."""
    quadratic_seconds: float
    linear_seconds: float
    fixed_seconds: float
    communication: RingCost | None
    date: str

    @property
    def cost_model(self) -> CostModel:
        return CostModel(
            quadratic_seconds=self.quadratic_seconds,
            linear_seconds=self.linear_seconds,
            fixed_seconds=self.fixed_seconds,
            communication=self.communication,
        )

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tree = {"format_version": FORMAT_VERSION} | asdict(self)
        path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def read_cost_profile(path: Path) -> CostProfile:
    """Read a profile.

    Raises:
        UserError: there is none, or it cannot be understood.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format_version") != FORMAT_VERSION:
            raise ValueError("another format version")
        communication = tree.pop("communication")
        found = CostProfile(
            communication=RingCost(**communication) if communication else None, **tree
        )
        # Refuses constants by which plans cannot be compared.
        _ = found.cost_model
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"parallel.cost_profile={path}: not a cost profile ({error}); "
            "measure one with: megatron-ext profile"
        ) from None


def subject_of(config: Config, *, device: str, dtype: str, vocab_size: int) -> dict[str, str | int]:
    """All that the constants depend on."""
    parallel = config.parallel
    recomputed: str = parallel.recompute_granularity
    if recomputed == "selective":
        recomputed += " " + " ".join(parallel.recompute_modules)
    return {
        "device": device,
        "dtype": dtype,
        **asdict(model_shape(config, vocab_size)),
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "recompute": recomputed,
    }


def load_cost_model(path: Path, *, subject: dict[str, str | int]) -> CostModel:
    """The constants for a run.

    Raises:
        UserError: they were measured for something else; names each difference.
    """
    profile = read_cost_profile(path)
    different = [
        f"  {name}: {profile.subject.get(name)} there, {value} here"
        for name, value in subject.items()
        if profile.subject.get(name) != value
    ]
    if different:
        raise UserError(
            "\n".join(
                [
                    f"parallel.cost_profile={path}: was measured for something else:",
                    *different,
                    "measure again with: megatron-ext profile",
                ]
            )
        )
    return profile.cost_model
