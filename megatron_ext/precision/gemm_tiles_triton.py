"""Pieces of the Triton products: in which order tiles are made, and how one is read and multiplied.

A program makes tiles [BLOCK_M, PARTS * BLOCK_N] of the result one after another. Each step over
the contracted dim reads BLOCK_K columns of both operands and adds, by KIND:

    direct      acc += a b^T                               FP8 tensor cores
    blockwise   acc += (a b^T) * s_a s_b                   of 128 columns at a time, in float32
    native      acc += (a s_a) (b s_b)^T                   the instruction takes the scales
    emulated    acc += bf16(a s_a) bf16(b s_b)^T           an element times a scale is exact in bf16

`blockwise` is the two-level sum of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2): Hopper's FP8
tensor cores add with about 14 bits, so their sum goes no further than 128 products. `direct` does
the same there (`max_num_imprecise_acc`). An e2m1 or e4m3 element times an e8m0 or e4m3 scale has at
most 6 significant bits and bf16 has float32's exponents, so `emulated` loses nothing either.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def tile_place(tile, num_down, num_across, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tiles down first, WINDOW of them, then across: neighbours in time share operands in L2."""
    first = tile // (WINDOW * num_across) * WINDOW
    height = tl.minimum(num_down - first, WINDOW)
    within = tile % (WINDOW * num_across)
    return first + within % height, within // height


@triton.jit  # type: ignore[untyped-decorator]
def read_tile(  # type: ignore[no-untyped-def]
    source,
    row,
    column,
    row_end,
    column_end,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    USES_TMA: tl.constexpr,
):
    """[ROWS, COLUMNS] of a matrix; zeros past its ends (TMA: past the ends of the whole matrix)."""
    if USES_TMA:
        return source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        pointers = source + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def read_block_scales(  # type: ignore[no-untyped-def]
    scales,
    row,
    num_rows,
    column,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Of 128 columns: float32 [ROWS], or one where 128 rows share it."""
    pointers = scales + (column // 128) * column_stride
    if BLOCK_ROWS == 1:
        rows = row + tl.arange(0, ROWS)
        return tl.load(pointers + rows * row_stride, mask=rows < num_rows, other=0.0)
    else:
        return tl.load(pointers + (row // BLOCK_ROWS) * row_stride)


@triton.jit  # type: ignore[untyped-decorator]
def read_small_scales(  # type: ignore[no-untyped-def]
    scales,
    row,
    num_rows,
    column,
    num_columns,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    IS_SWIZZLED: tl.constexpr,
):
    """Scales of a few columns each: [ROWS, COLUMNS], row and column counted in scales.

    Swizzled (`scale_swizzle.py`): blocks of 128 x 4 as Blackwell's matrix instructions read them,
    fetched whole by TMA and put in order in registers or, where Triton sees it, not at all.
    """
    if IS_SWIZZLED:
        block = scales.load([row // 128, column // 4, 0, 0])
        block = block.reshape(ROWS // 128, COLUMNS // 4, 32, 4, 4)
        return block.trans(0, 3, 2, 1, 4).reshape(ROWS, COLUMNS)
    else:
        rows = (row + tl.arange(0, ROWS)) // BLOCK_ROWS
        columns = column + tl.arange(0, COLUMNS)
        pointers = scales + rows[:, None] * row_stride + columns[None, :] * column_stride
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        return tl.load(pointers, mask=inside, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def e2m1_values(  # type: ignore[no-untyped-def]
    packed,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Two codes a byte, the first in the low bits: uint8 [ROWS, COLUMNS / 2] -> float32."""
    codes = tl.join(packed & 0xF, packed >> 4).reshape(ROWS, COLUMNS).to(tl.int32)
    size = codes & 7
    # 2^(e - 1) (1 + m / 2) in float32's own fields; below 1 there are only 0 and one half.
    bits = tl.where(size < 2, size * 0x3F000000, (size << 22) + 0x3F000000)
    return (bits | ((codes & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_values(codes):  # type: ignore[no-untyped-def]
    """2^(code - 127): uint8 -> float32; 255 is NaN."""
    words = codes.to(tl.int32)
    bits = tl.where(words == 0, 0x00400000, words << 23)
    return tl.where(words == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def fp8_values(codes, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """FP8 codes as bytes -> float32, by integers: for targets without FP8 of this kind."""
    words = codes.to(tl.int32)
    sign = (words & 0x80) << 24
    size = words & 0x7F
    if FORMAT == "e5m2":
        # float16 without its last eight bits.
        half = (words << 8).to(tl.int16).to(tl.float16, bitcast=True)
        return half.to(tl.float32)
    else:
        normal = (size << 20) + ((127 - 7) << 23)
        small = (size.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
        bits = tl.where(size < 8, small, normal)
        bits = tl.where(size == 0x7F, 0x7FC00000, bits)
        return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def decoded(  # type: ignore[no-untyped-def]
    codes,
    scales,
    FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements times scales, exactly: bf16 [ROWS, COLUMNS]."""
    is_packed: tl.constexpr = FORMAT == "e2m1"
    values = e2m1_values(codes, ROWS, COLUMNS) if is_packed else fp8_values(codes, FORMAT)
    if SCALE == "none":
        return values.to(tl.bfloat16)
    else:
        factors = e8m0_values(scales) if SCALE == "e8m0" else fp8_values(scales, "e4m3")
        blocks = values.reshape(ROWS, COLUMNS // BLOCK, BLOCK) * factors[:, :, None]
        return blocks.reshape(ROWS, COLUMNS).to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator]
def multiplied(  # type: ignore[no-untyped-def]
    acc,
    a,
    a_scales,
    b,
    b_scales,
    KIND: tl.constexpr,
    LEFT_FORMAT: tl.constexpr,
    RIGHT_FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    LEFT_BLOCK_ROWS: tl.constexpr,
    RIGHT_BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DECODES: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """acc + a b^T of one step: float32 [BLOCK_M, BLOCK_N].

    WIDENS: multiply bf16 values as float32; the interpreter cannot multiply bf16.
    """
    if KIND == "direct":
        return tl.dot(a, b.T, acc, max_num_imprecise_acc=BLOCK_K)
    elif KIND == "blockwise":
        if DECODES:
            a = decoded(a, a_scales, LEFT_FORMAT, "none", BLOCK_M, BLOCK_K, BLOCK)
            b = decoded(b, b_scales, RIGHT_FORMAT, "none", BLOCK_N, BLOCK_K, BLOCK)
            if WIDENS:
                a, b = a.to(tl.float32), b.to(tl.float32)
        part = tl.dot(a, b.T)
        if LEFT_BLOCK_ROWS == 1 and RIGHT_BLOCK_ROWS == 1:
            return acc + part * a_scales[:, None] * b_scales[None, :]
        elif LEFT_BLOCK_ROWS == 1:
            return acc + part * (a_scales * b_scales)[:, None]
        elif RIGHT_BLOCK_ROWS == 1:
            return acc + part * (a_scales * b_scales)[None, :]
        else:
            return acc + part * (a_scales * b_scales)
    elif KIND == "native":
        if SCALE == "e4m3":
            a_scales = a_scales.to(tl.float8e4nv, bitcast=True)
            b_scales = b_scales.to(tl.float8e4nv, bitcast=True)
        return tl.dot_scaled(a, a_scales, LEFT_FORMAT, b.T, b_scales, RIGHT_FORMAT, acc)
    else:
        left = decoded(a, a_scales, LEFT_FORMAT, SCALE, BLOCK_M, BLOCK_K, BLOCK)
        right = decoded(b, b_scales, RIGHT_FORMAT, SCALE, BLOCK_N, BLOCK_K, BLOCK)
        if WIDENS:
            left, right = left.to(tl.float32), right.to(tl.float32)
        return tl.dot(left, right.T, acc)


@triton.jit  # type: ignore[untyped-decorator]
def write_tile(  # type: ignore[no-untyped-def]
    out,
    acc,
    row,
    row_end,
    column,
    num_columns,
    out_row,
    stride,
    left_factor,
    right_factor,
    left_factor_stride,
    right_factor_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_LEFT_FACTOR: tl.constexpr,
    HAS_RIGHT_FACTOR: tl.constexpr,
    ADDS: tl.constexpr,
):
    """acc times the factors of its rows and columns, rounded once, stored or added."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    is_row, is_column = rows < row_end, columns < num_columns
    if HAS_LEFT_FACTOR:
        factor = tl.load(left_factor + rows * left_factor_stride, mask=is_row, other=0.0)
        acc = acc * factor[:, None]
    if HAS_RIGHT_FACTOR:
        factor = tl.load(right_factor + columns * right_factor_stride, mask=is_column, other=0.0)
        acc = acc * factor[None, :]
    pointers = out + (out_row + rows).to(tl.int64)[:, None] * stride + columns[None, :]
    inside = is_row[:, None] & is_column[None, :]
    if ADDS:
        acc += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)
