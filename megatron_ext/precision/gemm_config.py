"""Which way a product goes on a target, and how large its tiles are there.

| target | FP8 | MXFP8, MXFP4 | NVFP4 |
|---|---|---|---|
| sm_90 | wgmma e4m3/e5m2 | emulated in bf16 | emulated in bf16 |
| sm_100 | tcgen05 kind::f8f6f4 | block scaled, in hardware | in hardware |
| sm_120 | mma.sync e4m3/e5m2 | block scaled, in hardware | in hardware |
| gfx950 (MI355X) | mfma fp8 | mfma scale | emulated in bf16 |
| gfx942 (MI300X) | converted (its own FP8 has other exponents) | emulated in bf16 | emulated |
| gfx90a (MI250X) | emulated in bf16: it has no FP8 | emulated in bf16 | emulated |

Tile sizes follow from registers and shared memory. A blockwise product holds a float32 sum and the
partial sum of 128 columns: 128 x 256 twice would be all 256 registers of 8 warps' threads, so the
tile is made in two parts of 128 columns that share the left operand and the partial sum's
registers: (128 x 256 + 128 x 128) / 256 = 192 a thread. While one group of four warps adds its
part, the other's matrix instructions run. Compiled for sm_90 that needs more than the 255 registers
a thread can have and spills about 120 bytes; 128 x 128 (`candidates`) does not, but reads a third
more from L2. Which is faster was not measured; the table's choice is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_ext.precision.block_format import BlockFormat

Backend = Literal["cuda", "hip", "interpreter"]
Kind = Literal["direct", "blockwise", "native", "emulated"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a kernel is made for: ("cuda", "90"), ("hip", "gfx942"), ("interpreter", "")."""

    backend: Backend
    arch: str

    @property
    def capability(self) -> int:
        """Of CUDA targets: 10 major + minor; 0 elsewhere."""
        return int(self.arch) if self.backend == "cuda" else 0

    @property
    def has_tma(self) -> bool:
        return self.capability >= 90

    @property
    def has_fp8(self) -> bool:
        """Whether Triton multiplies E4M3 and E5M2 there as they are, or converts them itself."""
        return self.capability >= 89 or self.arch in ("gfx942", "gfx950", "")

    def takes_scales(self, block_format: BlockFormat) -> bool:
        """Whether the matrix instruction takes the scales of small blocks."""
        if block_format.scale == "e4m3":
            return self.capability >= 100
        return self.capability >= 100 or self.arch in ("gfx950", "")


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Sizes of a tile and how the kernel is launched.

    Attributes:
        rows, columns: of a part of the result.
        parts: side by side in one tile, 1 or 2.
        depth: of the contracted dim, a step.
        window: tiles down before the next across.
        flattens: loads of the next tile start before this one is stored.
        warp_specializes: warps of their own for loads and for matrix instructions.
        programs_per_unit: that a multiprocessor runs at once.
    """

    rows: int = 128
    columns: int = 128
    parts: int = 1
    depth: int = 128
    window: int = 8
    num_warps: int = 8
    num_stages: int = 3
    flattens: bool = False
    warp_specializes: bool = False
    programs_per_unit: int = 1


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """How one product is made.

    Attributes:
        decodes: blockwise FP8 where there is no FP8: elements are made bf16 first.
        uses_tma: operands are fetched by TMA where their strides allow it.
        swizzles: scales are put in the order of `scale_swizzle.py` first.
    """

    kind: Kind
    tile: TileConfig
    decodes: bool = False
    uses_tma: bool = False
    swizzles: bool = False


def plan_of(block_format: BlockFormat, target: Target) -> GemmPlan:
    """The table's choice; `candidates` has what else is worth trying on a device."""
    kind = kind_of(block_format, target)
    return GemmPlan(
        kind=kind,
        tile=_tile_config(kind, target, is_packed=block_format.is_packed),
        decodes=kind == "blockwise" and not target.has_fp8,
        uses_tma=target.has_tma,
        swizzles=kind == "native" and target.capability >= 100,
    )


def candidates(block_format: BlockFormat, target: Target) -> list[GemmPlan]:
    """What a tuning run tries, the table's choice first."""
    chosen = plan_of(block_format, target)
    if target.capability not in range(90, 120) or chosen.kind == "emulated":
        return [chosen]
    tiles = [
        TileConfig(num_stages=4),
        TileConfig(rows=64, num_stages=4, num_warps=4, programs_per_unit=2),
        TileConfig(rows=64, parts=2, num_stages=3, num_warps=4),
        TileConfig(parts=2, num_stages=3, window=16),
    ]
    return [chosen, *(replace(chosen, tile=tile) for tile in tiles if tile != chosen.tile)]


def kind_of(block_format: BlockFormat, target: Target) -> Kind:
    if block_format.scale == "fp32":
        if block_format.block_columns is not None:
            return "blockwise"
        return "direct" if target.has_fp8 else "emulated"
    return "native" if target.takes_scales(block_format) else "emulated"


def _tile_config(kind: Kind, target: Target, *, is_packed: bool) -> TileConfig:
    if target.backend == "interpreter":
        return TileConfig(num_stages=1)
    if target.backend == "hip":
        return _hip_config(kind)
    if kind == "emulated":
        # Scales of 16 columns and values of both operands as bf16: 128 rows would not fit.
        return TileConfig(rows=64 if is_packed else 128, depth=64)
    if target.capability >= 120:
        # 99 KiB of shared memory: three stages of two 16 KiB tiles.
        return TileConfig()
    if target.capability >= 100:
        if kind == "blockwise":
            return TileConfig(num_stages=4)
        # In one part: triton 3.6 fails where two instructions share an operand's scales.
        return TileConfig(columns=256, depth=256 if is_packed else 128, num_stages=4)
    if target.capability >= 90:
        return TileConfig(parts=2, num_stages=4)
    return TileConfig(depth=64 if kind == "direct" else 128)


def _hip_config(kind: Kind) -> TileConfig:
    if kind == "emulated":
        # 64 KiB of local memory: two bf16 tiles of 128 x 64 in two stages.
        return TileConfig(depth=64, num_stages=2, num_warps=4, window=4)
    if kind == "native":
        return TileConfig(num_stages=2, num_warps=4, window=4)
    return TileConfig(columns=64, num_stages=2, window=4)
