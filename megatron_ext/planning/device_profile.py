"""What a planner must know of a device and of the links between devices: data, one YAML file each.

`megatron_ext/planning/profiles/NAME.yaml` ships; a site copies one, changes it and names the file.
Peaks are data sheets'; what is attained of them are the stated constants that predictions rest on,
and docs/planning.md shows what they give beside published and measured figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_ext.errors import UserError
from megatron_ext.profile_file import profile_names, profile_path, read_profile

NumberFormat = Literal["fp32", "bf16", "fp8", "fp4"]
_FOLDER = Path(__file__).parent / "profiles"
_GIGA, _MICRO = 1e9, 1e-6


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Link(_Entry):
    """Between ranks that are at most so far apart."""

    max_ranks: int | None = Field(ge=2)
    """Consecutive ranks that it joins; null: any number."""
    gigabytes_per_second: float = Field(gt=0)
    """One way, of one rank, as a collective of many attains it."""
    microseconds: float = Field(ge=0)
    """Of one message."""

    def seconds(self, num_bytes: float, *, num_messages: float = 1.0) -> float:
        """What one rank sends in num_messages one after another."""
        return (
            num_bytes / (self.gigabytes_per_second * _GIGA)
            + num_messages * self.microseconds * _MICRO
        )


class DeviceProfile(_Entry):
    """One device as a rank sees it."""

    title: str
    source: str
    is_cpu: bool = False
    """Ranks that compute on a processor: logits in smaller parts, formats of 4 bits emulated."""
    peak_tflops: dict[NumberFormat, float]
    """Dense matrix products; a format that is missing is emulated in bf16."""
    gemm_efficiency: float = Field(gt=0, le=1)
    """Attained of the peak by products of large matrices."""
    gemm_half_size: float = Field(ge=0)
    """A product attains d / (d + this) of that for each of its three sizes d."""
    low_precision_efficiency: float = Field(1.0, gt=0, le=1)
    """The same factor once more, for products in fp8 and fp4."""
    attention_efficiency: float = Field(gt=0, le=1)
    """Attained of the bf16 peak by attention, forward and backward."""
    memory_gib: float = Field(gt=0)
    usable_memory: float = Field(0.92, gt=0, le=1)
    """Share that tensors may fill; the rest is lost between them."""
    fixed_memory_gib: float = Field(ge=0)
    """Runtime, communication buffers, workspaces of libraries."""
    memory_gigabytes_per_second: float = Field(gt=0)
    memory_efficiency: float = Field(gt=0, le=1)
    """Attained of it by operations that touch each element once."""
    layer_microseconds: float = Field(ge=0)
    """One layer in one direction, whatever it computes: kernels that must be launched."""
    expert_microseconds: float = Field(0.0, ge=0)
    """The same of a layer with experts, besides: routing, counts that the host must know, ranks
    that wait for the fullest expert."""
    expert_row_nanoseconds: float = Field(0.0, ge=0)
    """And for each row that goes to an expert."""
    tensor_overlap: float = Field(0.0, ge=0, le=1)
    """Share of tensor-parallel communication that hides behind products."""
    ranks_per_node: int = Field(ge=1)
    links: list[Link] = Field(min_length=1)
    """The nearest first."""

    @model_validator(mode="after")
    def _links_end_with_any(self) -> DeviceProfile:
        if self.links[-1].max_ranks is not None:
            raise ValueError("the last of links must have max_ranks: null")
        return self

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * 2**30

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * self.usable_memory

    @property
    def fixed_bytes(self) -> int:
        return round(self.fixed_memory_gib * 2**30)

    def peak_flops(self, number_format: NumberFormat) -> float:
        """Per second; of bf16, or of fp32 where the device has no bf16, for what it lacks."""
        for known in (number_format, "bf16", "fp32"):
            if known in self.peak_tflops:
                return self.peak_tflops[known] * 1e12
        raise UserError(f"{self.title}: peak_tflops names neither bf16 nor fp32")

    def link(self, num_ranks: int) -> Link:
        """Joins this many consecutive ranks."""
        return next(
            link for link in self.links if link.max_ranks is None or num_ranks <= link.max_ranks
        )

    def gemm_seconds(
        self, rows: float, columns: float, inner: float, *, number_format: NumberFormat = "bf16"
    ) -> float:
        """[rows, inner] times [inner, columns]."""
        attained = self.peak_flops(number_format) * self.gemm_efficiency
        for size in (rows, columns, inner):
            attained *= size / (size + self.gemm_half_size)
        if number_format in ("fp8", "fp4") and number_format in self.peak_tflops:
            attained *= self.low_precision_efficiency
        return 2.0 * rows * columns * inner / attained

    def memory_seconds(self, num_bytes: float) -> float:
        return num_bytes / (self.memory_gigabytes_per_second * _GIGA * self.memory_efficiency)


def device_profile_names() -> list[str]:
    return profile_names(_FOLDER)


def load_profile(name: str) -> DeviceProfile:
    """A profile that ships, by name, or a YAML file.

    Raises:
        UserError: there is none, or it says something that cannot be; names file and key.
    """
    path = profile_path(name, _FOLDER, kind="device profile")
    return read_profile(path, DeviceProfile, kind="device profile")
