"""Triton kernel of `hash_rows`: reads each row once; products stay in registers until they are a
code."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernel_case import KernelCase, argument_types, on_all_targets

_ROWS = 16
_MAX_CHANNELS = 64


@triton.jit  # type: ignore[untyped-decorator]
def hash_kernel(
    rows: tl.tensor,
    rotations: tl.tensor,
    values: tl.tensor,
    codes: tl.tensor,
    num_rows: tl.tensor,
    hidden_size: tl.tensor,
    num_hashes: tl.tensor,
    hash_dim: tl.tensor,
    row_stride: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HASHES: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    IS_WIDENED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    column = tl.arange(0, HASHES * DIRECTIONS)
    hash_of, direction_of = column // DIRECTIONS, column % DIRECTIONS
    is_column = (hash_of < num_hashes) & (direction_of < hash_dim)
    rotation_pointers = rotations + (hash_of * hash_dim + direction_of) * hidden_size
    projected = tl.zeros((ROWS, HASHES * DIRECTIONS), dtype=tl.float32)
    for first in range(0, hidden_size, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        is_channel = channel < hidden_size
        part = tl.load(
            rows + row[:, None] * row_stride + channel[None, :],
            mask=is_row[:, None] & is_channel[None, :],
            other=0.0,
        )
        rotation = tl.load(
            rotation_pointers[None, :] + channel[:, None],
            mask=is_column[None, :] & is_channel[:, None],
            other=0.0,
        )
        if IS_WIDENED:
            part, rotation = part.to(tl.float32), rotation.to(tl.float32)
        # No rounding of float32 to fewer bits: the reference has none.
        projected += tl.dot(part, rotation, input_precision="ieee")
    cube = tl.reshape(projected, (ROWS, HASHES, DIRECTIONS))
    direction = tl.arange(0, DIRECTIONS)[None, None, :]
    sizes = tl.where(direction < hash_dim, tl.abs(cube), -1.0)
    corner = tl.argmax(sizes, axis=2, tie_break_left=True)
    at_corner = tl.sum(tl.where(direction == corner[:, :, None], cube, 0.0), axis=2)
    digit = (corner + tl.where(at_corner < 0, hash_dim, 0)).to(tl.int64)
    number = tl.arange(0, HASHES)
    value = tl.load(values + number, mask=number < num_hashes, other=0)
    tl.store(codes + row, tl.sum(digit * value[None, :], axis=1), mask=is_row)


def hash_rows_triton(rows: Tensor, rotations: Tensor) -> Tensor:
    """As `hash_rows`, for rows of at most 32 bits a value."""
    num_rows, hidden_size = rows.shape
    num_hashes, hash_dim, _ = rotations.shape
    codes = torch.empty(num_rows, dtype=torch.int64, device=rows.device)
    if num_rows == 0:
        return codes
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    hashes = triton.next_power_of_2(num_hashes)
    # A product needs 16 columns.
    directions = max(triton.next_power_of_2(hash_dim), 16 // hashes, 2)
    hash_kernel[(triton.cdiv(num_rows, _ROWS),)](
        rows,
        rotations.contiguous(),
        (2 * hash_dim) ** torch.arange(num_hashes, device=rows.device),
        codes,
        num_rows,
        hidden_size,
        num_hashes,
        hash_dim,
        rows.stride(0),
        ROWS=_ROWS,
        CHANNELS=max(16, min(_MAX_CHANNELS, triton.next_power_of_2(hidden_size))),
        HASHES=hashes,
        DIRECTIONS=directions,
        # The interpreter cannot multiply bfloat16.
        IS_WIDENED=not rows.is_cuda,
    )
    return codes


def kernel_cases() -> tuple[KernelCase, ...]:
    """bfloat16 is multiplied by the matrix units."""
    types = {"rows": "*bf16", "rotations": "*bf16", "values": "*i64", "codes": "*i64"}
    return (
        KernelCase(
            kernel=hash_kernel,
            signature=argument_types(hash_kernel, types),
            constants={
                **{"ROWS": _ROWS, "CHANNELS": _MAX_CHANNELS, "HASHES": 8, "DIRECTIONS": 4},
                "IS_WIDENED": False,
            },
            expects=on_all_targets(
                ptx=("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",),
                amdgcn=("v_mfma_f32_16x16x16_bf16",),
                gfx90a=("v_mfma_f32_16x16x16bf16_1k",),
                gfx950=("v_mfma_f32_16x16x32_bf16",),
            ),
            unaligned=frozenset({"num_rows", "num_hashes", "hash_dim"}),
        ),
    )
