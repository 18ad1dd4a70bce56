"""How the kernels that quantise are compiled without a device: each format as recipes use it, rows,
transpose and both, with the device's own conversion where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_ext.precision.block_format import BLOCK_FORMATS
from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.gemm_config import Target
from megatron_ext.precision.quantize_kernel_triton import (
    CopyPlan,
    largest_magnitudes,
    quantize_tiles,
)
from megatron_ext.precision.quantize_launch_triton import (
    Before,
    TileSize,
    converted_elements,
    copy_plan,
    tile_size,
    warp_size,
)
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.tile_source_triton import reciprocal_root_mean_squares
from parallel.kernel_case import TARGETS, KernelCase, argument_types
from parallel.kernel_case import Target as CompileTarget

_CONVERSIONS = {
    "e4m3": "cvt.rn.satfinite.e4m3x2.f32",
    "e5m2": "cvt.rn.satfinite.e5m2x2.f32",
    "e2m1": "cvt.rn.satfinite.e2m1x2.f32",
}


# Where all is whole-number arithmetic: that something comes of it.
_STORES = {"cuda": "st.global", "hip": "global_store"}
_ATOMICS = {"cuda": "atom.global", "hip": "global_atomic"}


@dataclass(frozen=True, slots=True)
class _Pass:
    """Copies that are made together."""

    name: str
    row: Quantizer | None
    column: Quantizer | None
    before: Before = "none"


def _passes() -> tuple[_Pass, ...]:
    made = {name: Quantizer(block_format) for name, block_format in BLOCK_FORMATS.items()}
    mxfp4, nvfp4 = BLOCK_FORMATS["mxfp4"], BLOCK_FORMATS["nvfp4"]
    quest = Quantizer(mxfp4, scale_rule="quest", hadamard_group=32, keeps_mask=True)
    headroom = Quantizer(
        mxfp4, "stochastic", scale_rule="headroom", hadamard_group=32, signs="random"
    )
    eden = Quantizer(nvfp4, scale_rule="eden", hadamard_group=128, signs="random")
    turned = Quantizer(nvfp4, hadamard_group=16, signs="fixed")
    turned_grad = Quantizer(nvfp4, "stochastic", hadamard_group=16, signs="fixed")
    grad = Quantizer(nvfp4, "stochastic")
    rows = made["fp8_1x128"]
    return (
        _Pass("fp8_tensor", made["fp8_tensor"], made["fp8_tensor"]),
        _Pass("fp8_row e5m2", made["fp8_row_e5m2"], None),
        _Pass("fp8_1x128", rows, None),
        _Pass("fp8_1x128 both", rows, rows),
        _Pass("fp8_1x128 rms_norm", rows, rows, "rms_norm"),
        _Pass("fp8_1x128 swiglu", rows, rows, "swiglu"),
        _Pass("fp8_128x128", made["fp8_128x128"], None),
        _Pass("mxfp8 both", made["mxfp8"], made["mxfp8"]),
        _Pass("mxfp4", made["mxfp4"], None),
        _Pass("quest", quest, None),
        _Pass("headroom both", headroom, headroom),
        _Pass("nvfp4 both", made["nvfp4"], turned),
        _Pass("nvfp4 gradient", grad, turned_grad),
        _Pass("nvfp4_2d", made["nvfp4_2d"], made["nvfp4_2d"]),
        _Pass("four over six", Quantizer(nvfp4, tries_four=True), None),
        _Pass("eden", eden, None),
        _Pass("eden transposed", None, eden),
    )


def kernel_cases() -> tuple[KernelCase, ...]:
    """Of bf16 matrices whose sizes are multiples of 16, as in a model."""
    cases = []
    for target in TARGETS:
        cases += [_tiles_case(each, target) for each in _passes()]
        cases += [_largest_case(name, target) for name in ("fp8_row", "fp8_tensor")]
        cases.append(
            KernelCase(
                kernel=reciprocal_root_mean_squares,
                name=target.name,
                signature=_signature(reciprocal_root_mean_squares),
                constants={"ROWS": 4, "COLUMNS": 1024},
                expects={target.name: (_STORES[target.backend],)},
            )
        )
    return tuple(cases)


def _plan(quantizer: Quantizer | None, target: CompileTarget) -> CopyPlan | None:
    if quantizer is None:
        return None
    converted = converted_elements(Target(target.backend, str(target.architecture)))
    plan = copy_plan(CopyRequest(quantizer), 1, converted)
    assert plan is not None
    return CopyPlan(quantizer, quantizer.signs != "none", plan.is_large, converted)


def _tiles_case(each: _Pass, target: CompileTarget) -> KernelCase:
    row, column = _plan(each.row, target), _plan(each.column, target)
    tile = tile_size(row, column)
    expected = {
        _CONVERSIONS[plan.quantizer.block_format.element.name]
        for plan in (row, column)
        if plan is not None and plan.casts
    }
    constants = {"ROW": row, "COLUMN": column, "WRITES": each.before != "none"}
    return _case(quantize_tiles, each.name, each.before, tile, target, constants, expected)


def _largest_case(name: str, target: CompileTarget) -> KernelCase:
    plan = _plan(Quantizer(BLOCK_FORMATS[name]), target)
    constants = {"P": plan, "TURNED": False}
    return _case(
        largest_magnitudes,
        name,
        "none",
        tile_size(plan, None),
        target,
        constants,
        {_ATOMICS[target.backend]},
    )


def _case(
    kernel: Any,
    name: str,
    before: Before,
    tile: TileSize,
    target: CompileTarget,
    constants: dict[str, Any],
    expected: set[str],
) -> KernelCase:
    by_group = warp_size(Target(target.backend, str(target.architecture)))
    return KernelCase(
        kernel=kernel,
        name=f"{name} {target.name}",
        signature=_signature(kernel, constants),
        constants=constants
        | {
            "BEFORE": before,
            "NATIVE": True,
            "TILE_ROWS": tile.rows,
            "TILE_COLUMNS": tile.columns,
        },
        expects={target.name: tuple(sorted(expected)) or (_STORES[target.backend],)},
        num_warps=tile.num_warps(by_group),
        options={"enable_fp_fusion": False},
    )


def _signature(kernel: Any, constants: dict[str, Any] | None = None) -> dict[str, str]:
    types = dict.fromkeys(("source", "weight", "original"), "*bf16")
    types |= {"rrms": "*fp32", "signs": "*fp32", "amax_bits": "*i32"}
    types |= dict.fromkeys(("share", "eps"), "fp32")
    for side in ("row", "column"):
        plan = (constants or {}).get(side.upper())
        is_float = plan is not None and plan.quantizer.block_format.scale == "fp32"
        types |= {f"{side}_{name}": "*u8" for name in ("codes", "kept")}
        types |= {f"{side}_{name}": "*fp32" for name in ("tensor_scale", "signs", "amax")}
        types[f"{side}_scales"] = "*fp32" if is_float else "*u8"
    return argument_types(kernel, types)
