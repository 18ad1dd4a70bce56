"""Which CUDA kernel multiplies two formats on a device, and what it asks of the sizes.

| kernel | left, right | out | device |
|---|---|---|---|
| `fp8_tall`, `fp8_small` | 1 x 128, 128 x 128, E4M3 | bfloat16, float32 | sm_90 |
| `fp8_rows` | 1 x 128 both, E4M3 | float32 | sm_90 |
| `nvfp4_*` | 1 x 16 or 16 x 16, E2M1 | bfloat16, float32 | sm_100, sm_120 |
| `mxfp4_*`, `mxfp8_*` | 1 x 32, E2M1, E4M3 | bfloat16, float32 | sm_100, sm_120 |

Experts: `fp8_tall` for forward and dgrad, `fp8_rows` for wgrad.

Tiles of 256 x 128 ask 32 bytes a clock and multiprocessor of L2 (the left tile goes to two blocks),
those of 128 x 128 48, about a third more than it gives; but few of the former may leave most
multiprocessors idle. Time in units of a 128 x 128 tile's arithmetic, P multiprocessors:

    tall   2 ceil(ceil(m / 256) ceil(n / 128) / P)         small   1.5 ceil(ceil(m / 128) ... / P)

An estimate from sizes: neither was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.precision.block_format import BlockFormat

# In the order of `enum class Kernel` in csrc/gemm/operators.h.
KERNELS = (
    "fp8_tall",
    "fp8_small",
    "fp8_rows",
    "nvfp4_sm100",
    "mxfp4_sm100",
    "mxfp8_sm100",
    "nvfp4_sm120",
    "mxfp4_sm120",
    "mxfp8_sm120",
)
# The copy engine takes rows of whole 16 bytes.
ROW_BYTES = 16
DEPTH_ALIGNMENT = 128

_SMALL_TILE_COST = 1.5
_TALL_ROWS, _TILE = 256, 128
_SINGLE = {
    ("fp8_1x128", "fp8_128x128"): "fp8",
    ("fp8_1x128", "fp8_1x128"): "fp8_rows",
    ("mxfp4", "mxfp4"): "mxfp4",
    ("mxfp8", "mxfp8"): "mxfp8",
} | {(left, right): "nvfp4" for left in ("nvfp4", "nvfp4_2d") for right in ("nvfp4", "nvfp4_2d")}


@dataclass(frozen=True, slots=True)
class CudaProduct:
    """One product as a kernel takes it.

    Attributes:
        rows, columns, depth: m, n, k.
        left_rows, right_rows: of the operands, that share a scale.
    """

    kernel: str
    rows: int
    columns: int
    depth: int
    left_rows: int = 1
    right_rows: int = 1

    def numbers(self) -> list[int]:
        """As the operator of csrc/bindings.cpp takes them."""
        sizes = [self.rows, self.columns, self.depth, self.left_rows, self.right_rows]
        return [KERNELS.index(self.kernel), *sizes]


def family_of(left: BlockFormat, right: BlockFormat) -> str | None:
    """`fp8`, `fp8_rows`, `nvfp4`, `mxfp4`, `mxfp8`; None: no CUDA kernel multiplies the two."""
    return _SINGLE.get((left.name, right.name))


def why_not_on(
    left: BlockFormat, right: BlockFormat, capability: tuple[int, int], *, is_grouped: bool
) -> str:
    """Why a device of that capability has no kernel for the two; empty where it has."""
    family = family_of(left, right)
    if family is None:
        return f"no CUDA kernel multiplies {left.name} by {right.name}"
    is_fp8 = family.startswith("fp8")
    if is_fp8 and capability != (9, 0):
        return f"FP8 in blocks of 128 is for sm_90; this device is {_name(capability)}"
    if not is_fp8 and capability not in ((10, 0), (12, 0)):
        return f"{family} is for sm_100 and sm_120; this device is {_name(capability)}"
    if is_grouped and not is_fp8:
        return f"there is no CUDA kernel for experts in {family}"
    return ""


def kernel_of(family: str, capability: tuple[int, int], *, is_tall: bool = True) -> str:
    """The name in `KERNELS` of a family that `why_not_on` has nothing against."""
    if family == "fp8":
        return "fp8_tall" if is_tall else "fp8_small"
    return family if family == "fp8_rows" else f"{family}_sm{capability[0]}{capability[1]}"


def takes_tall_tiles(rows: int, columns: int, num_multiprocessors: int) -> bool:
    """Whether 256 x 128 is estimated to be at least as quick as 128 x 128."""

    def waves(tile_rows: int) -> int:
        tiles = -(-rows // tile_rows) * -(-columns // _TILE)
        return -(-tiles // num_multiprocessors)

    return 2 * waves(_TALL_ROWS) <= _SMALL_TILE_COST * waves(_TILE)


def check_sizes(left: BlockFormat, depth: int, columns: int, out_bytes: int) -> None:
    """ValueError where a row is no multiple of 16 bytes, with what would be.

    Args:
        out_bytes: of an element of the result.
    """
    step = ROW_BYTES * 8 // left.element.bits
    if depth % step:
        raise ValueError(
            f"CUDA products of {left.name} contract over multiples of {step}; this is {depth}"
        )
    step = ROW_BYTES // out_bytes
    if columns % step:
        raise ValueError(
            f"CUDA products have rows of multiples of {step} elements of {out_bytes} bytes; right "
            f"has {columns} rows"
        )


def _name(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
