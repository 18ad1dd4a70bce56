"""How the Triton products are compiled without a device: each format and grouping on each target,
with the table's tile sizes there and the instruction that must come out."""

from __future__ import annotations

from typing import Any

import triton

from megatron_ext.precision.block_format import BLOCK_FORMATS, BlockFormat
from megatron_ext.precision.gemm_config import GemmPlan, Target, plan_of
from megatron_ext.precision.gemm_kernel_triton import product_kernel
from parallel.kernel_case import TARGETS, KernelCase, argument_types
from parallel.kernel_case import Target as CompileTarget

# Left, right, grouping.
_PRODUCTS = (
    ("fp8_tensor", "fp8_tensor_e5m2", "none"),
    ("fp8_row", "fp8_row", "rows"),
    ("fp8_1x128", "fp8_128x128", "none"),
    ("fp8_1x128", "fp8_128x128", "rows"),
    ("fp8_1x128", "fp8_1x128", "columns"),
    ("mxfp8", "mxfp8", "none"),
    ("mxfp8", "mxfp8", "rows"),
    ("mxfp4", "mxfp4", "none"),
    ("mxfp4", "mxfp4", "columns"),
    ("nvfp4", "nvfp4_2d", "none"),
    ("nvfp4", "nvfp4", "columns"),
)
_NUM_EXPERTS = 8
_BFLOAT16 = {
    "sm_90": ("wgmma.mma_async", "k16.f32.bf16.bf16"),
    "gfx90a": ("v_mfma_f32_32x32x8bf16_1k",),
    "gfx942": ("v_mfma_f32_32x32x8_bf16",),
    "gfx950": ("v_mfma_f32_32x32x16_bf16",),
}
# MI300X multiplies FP8 with other exponents than these; Triton makes OCP's FP8 float16 there.
_FP8 = {
    "sm_90": "wgmma.mma_async.sync.aligned.m64n128k32.f32.{elements}",
    "sm_100": "tcgen05.mma.cta_group::1.kind::f8f6f4",
    "sm_120": "mma.sync.aligned.m16n8k32.row.col.f32.{elements}.f32",
    "gfx942": "v_mfma_f32_32x32x8_f16",
    "gfx950": "v_mfma_f32_32x32x64_f8f6f4",
}
# By the scales of 4-bit elements; and of MXFP8.
_BLOCK_SCALED = {
    "mxfp8": {
        "sm_100": "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale",
        "sm_120": "kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0",
        "gfx950": "v_mfma_scale_f32_32x32x64_f8f6f4",
    },
    "e8m0": {
        "sm_100": "tcgen05.mma.cta_group::1.kind::mxf4.block_scale",
        "sm_120": "kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
        "gfx950": "v_mfma_scale_f32_32x32x64_f8f6f4",
    },
    "e4m3": {
        "sm_100": "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale",
        "sm_120": "kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
    },
}
_ELEMENT_TYPES = {"e4m3": "fp8e4nv", "e5m2": "fp8e5", "e2m1": "u8"}


def kernel_cases() -> tuple[KernelCase, ...]:
    """Sizes are multiples of 16, as in a model; the result is bf16, in wgrad added to float32."""
    return tuple(
        _case(BLOCK_FORMATS[left], BLOCK_FORMATS[right], grouping, target)
        for left, right, grouping in _PRODUCTS
        for target in TARGETS
    )


def _case(
    left: BlockFormat, right: BlockFormat, grouping: str, target: CompileTarget
) -> KernelCase:
    plan = plan_of(left, Target(target.backend, str(target.architecture)))
    constants = _constants(left, right, grouping, plan)
    types = {
        "left": _matrix_type(left, plan, plan.tile.rows),
        "right": _matrix_type(right, plan, plan.tile.columns),
        "left_scales": _scales_type(left, plan, plan.tile.rows, constants["LEFT_SWIZZLED"]),
        "right_scales": _scales_type(right, plan, plan.tile.columns, constants["RIGHT_SWIZZLED"]),
        "left_factor": "*fp32",
        "right_factor": "*fp32",
        "out": "*fp32" if constants["ADDS"] else "*bf16",
        "starts": "*i32",
    }
    signature = argument_types(product_kernel, types)
    # Numbers that are one are known when Triton compiles for a launch.
    known = {f"{side}_scale_{dim}": 1 for side, dim in _unit_strides(left, right, constants)}
    if grouping == "none":
        known["num_groups"] = 1
    return KernelCase(
        kernel=product_kernel,
        name=f"{left.name} {right.name} {grouping} {target.name}",
        signature={name: kind for name, kind in signature.items() if name not in known},
        constants=constants | known,
        expects={target.name: _expected(left, right, plan, target)},
        num_warps=plan.tile.num_warps,
        num_stages=plan.tile.num_stages,
    )


def _constants(
    left: BlockFormat, right: BlockFormat, grouping: str, plan: GemmPlan
) -> dict[str, Any]:
    tile = plan.tile
    scale = left.scale if plan.kind in ("native", "emulated") and left.scale != "fp32" else "none"
    block_rows = [
        1 if plan.swizzles or each.block_rows is None else each.block_rows for each in (left, right)
    ]
    has_factor = left.block_columns is None or left.has_tensor_scale
    return {
        "GROUPING": grouping,
        "GROUPS": triton.next_power_of_2(_NUM_EXPERTS if grouping != "none" else 1),
        "KIND": plan.kind,
        "LEFT_FORMAT": left.element.name,
        "RIGHT_FORMAT": right.element.name,
        "SCALE": scale,
        "LEFT_BLOCK_ROWS": block_rows[0],
        "RIGHT_BLOCK_ROWS": block_rows[1],
        "BLOCK": left.block_columns or 1,
        "HAS_LEFT_FACTOR": has_factor,
        "HAS_RIGHT_FACTOR": has_factor,
        "ADDS": grouping == "columns",
        "DECODES": plan.decodes,
        "WIDENS": False,
        "USES_TMA": plan.uses_tma,
        "LEFT_SWIZZLED": plan.swizzles and grouping != "rows",
        "RIGHT_SWIZZLED": plan.swizzles,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "PARTS": tile.parts,
        "WINDOW": tile.window,
        "FLATTENS": tile.flattens,
        "WARP_SPECIALIZES": tile.warp_specializes,
    }


def _matrix_type(block_format: BlockFormat, plan: GemmPlan, rows: int) -> str:
    is_fp8 = plan.kind in ("direct", "blockwise") and not plan.decodes
    element = _ELEMENT_TYPES[block_format.element.name] if is_fp8 else "u8"
    step = plan.tile.depth // (2 if block_format.is_packed else 1)
    return f"tensordesc<{element}[{rows}, {step}]>" if plan.uses_tma else f"*{element}"


def _scales_type(block_format: BlockFormat, plan: GemmPlan, rows: int, is_swizzled: bool) -> str:
    if block_format.scale == "fp32":
        # Where there are none the kernel gets the result in their place.
        return "*fp32"
    if not is_swizzled:
        return "*u8"
    assert block_format.block_columns is not None
    across = plan.tile.depth // block_format.block_columns // 4
    return f"tensordesc<u8[{rows // 128}, {across}, 2, 256]>"


def _unit_strides(
    left: BlockFormat, right: BlockFormat, constants: dict[str, Any]
) -> list[tuple[str, str]]:
    found = []
    for side, block_format in (("left", left), ("right", right)):
        turned = block_format.scale == "fp32" and block_format.block_rows == 1
        if block_format.block_columns and not constants[f"{side.upper()}_SWIZZLED"]:
            found.append((side, "row" if turned else "column"))
    return found


def _expected(
    left: BlockFormat, right: BlockFormat, plan: GemmPlan, target: CompileTarget
) -> tuple[str, ...]:
    """The matrix instruction, and TMA where operands are fetched by it."""
    tma = ("cp.async.bulk.tensor.2d",) if plan.uses_tma else ()
    if plan.kind == "emulated" or plan.decodes:
        return (*_BFLOAT16[target.name], *tma)
    elements = f"{left.element.name}.{right.element.name}"
    if plan.kind != "native":
        return (_FP8[target.name].format(elements=elements), *tma)
    return (_BLOCK_SCALED[left.scale if left.is_packed else "mxfp8"][target.name], *tma)
