"""The Triton product of matrices of few bits: left right^T, one kernel for single and grouped.

Programs are as many as the device runs at once; each makes every num_programs-th tile. GROUPING:

    none      [M, K] x [N, K] -> [M, N]
    rows      rows sorted by expert: rows of expert e, [starts[e], starts[e + 1]), times its
              weight: [T, K] x [E, N, K] -> [T, N]          (forward; dgrad with the transposes)
    columns   contracted over each expert's tokens: [M, T] x [N, T] -> [E, M, N]          (wgrad)

`starts` stays on the device: a program finds a tile's expert in the running sum of the experts'
tiles, so nobody waits for the host. Tiles never reach over two experts.
"""

import triton
import triton.language as tl

from megatron_ext.precision.gemm_tiles_triton import (
    multiplied,
    read_block_scales,
    read_small_scales,
    read_tile,
    tile_place,
    write_tile,
)


@triton.jit  # type: ignore[untyped-decorator]
def step_scales(  # type: ignore[no-untyped-def]
    scales,
    row,
    row_end,
    scales_row,
    column,
    depth,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    IS_SWIZZLED: tl.constexpr,
):
    """An operand's scales of one step; nothing where it has none.

    scales_row: where this expert's rows begin in swizzled scales; pointers are moved there before.
    """
    if KIND == "blockwise":
        return read_block_scales(
            scales, row, row_end, column, row_stride, column_stride, ROWS, BLOCK_ROWS
        )
    elif SCALE == "none":
        return 0
    else:
        first = scales_row + row if IS_SWIZZLED else row
        return read_small_scales(
            scales,
            first,
            (row_end + BLOCK_ROWS - 1) // BLOCK_ROWS,
            column // BLOCK,
            (depth + BLOCK - 1) // BLOCK,
            row_stride,
            column_stride,
            ROWS,
            BLOCK_K // BLOCK,
            BLOCK_ROWS,
            IS_SWIZZLED,
        )


@triton.jit  # type: ignore[untyped-decorator]
def step_of_part(  # type: ignore[no-untyped-def]
    acc,
    a,
    a_scales,
    right,
    right_scales,
    above,
    scales_above,
    column,
    num_columns,
    at,
    depth,
    right_stride,
    scale_row,
    scale_column,
    KIND: tl.constexpr,
    LEFT_FORMAT: tl.constexpr,
    RIGHT_FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    LEFT_BLOCK_ROWS: tl.constexpr,
    RIGHT_BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DECODES: tl.constexpr,
    WIDENS: tl.constexpr,
    USES_TMA: tl.constexpr,
    IS_SWIZZLED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + a b^T for BLOCK_N rows of the right operand."""
    PACKED: tl.constexpr = 2 if RIGHT_FORMAT == "e2m1" else 1
    b = read_tile(
        right,
        above + column,
        at // PACKED,
        above + num_columns,
        depth // PACKED,
        right_stride,
        BLOCK_N,
        BLOCK_K // PACKED,
        USES_TMA,
    )
    b_scales = step_scales(
        right_scales,
        column,
        num_columns,
        scales_above,
        at,
        depth,
        scale_row,
        scale_column,
        BLOCK_N,
        BLOCK_K,
        RIGHT_BLOCK_ROWS,
        BLOCK,
        KIND,
        SCALE,
        IS_SWIZZLED,
    )
    return multiplied(
        acc,
        a,
        a_scales,
        b,
        b_scales,
        KIND,
        LEFT_FORMAT,
        RIGHT_FORMAT,
        SCALE,
        LEFT_BLOCK_ROWS,
        RIGHT_BLOCK_ROWS,
        BLOCK,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        DECODES,
        WIDENS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    left,
    right,
    left_scales,
    right_scales,
    left_factor,
    right_factor,
    out,
    starts,
    num_rows,
    num_columns,
    depth,
    num_groups,
    left_stride,
    right_stride,
    out_stride,
    left_scale_row,
    left_scale_column,
    right_scale_row,
    right_scale_column,
    right_scale_group,
    left_factor_row,
    left_factor_group,
    right_factor_row,
    right_factor_group,
    GROUPING: tl.constexpr,
    GROUPS: tl.constexpr,
    KIND: tl.constexpr,
    LEFT_FORMAT: tl.constexpr,
    RIGHT_FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    LEFT_BLOCK_ROWS: tl.constexpr,
    RIGHT_BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LEFT_FACTOR: tl.constexpr,
    HAS_RIGHT_FACTOR: tl.constexpr,
    ADDS: tl.constexpr,
    DECODES: tl.constexpr,
    WIDENS: tl.constexpr,
    USES_TMA: tl.constexpr,
    LEFT_SWIZZLED: tl.constexpr,
    RIGHT_SWIZZLED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    FLATTENS: tl.constexpr,
    WARP_SPECIALIZES: tl.constexpr,
):
    PACKED: tl.constexpr = 2 if LEFT_FORMAT == "e2m1" else 1
    num_across = tl.cdiv(num_columns, PARTS * BLOCK_N)
    num_down = tl.cdiv(num_rows, BLOCK_M)
    if GROUPING == "rows":
        group_index = tl.arange(0, GROUPS)
        is_group = group_index < num_groups
        firsts = tl.load(starts + group_index, mask=is_group, other=0).to(tl.int32)
        lasts = tl.load(starts + group_index + 1, mask=is_group, other=0).to(tl.int32)
        tiles_of = (lasts - firsts + BLOCK_M - 1) // BLOCK_M
        tiles_up_to = tl.cumsum(tiles_of)
        num_down = tl.sum(tiles_of)
    num_tiles = num_down * num_across
    if GROUPING == "columns":
        num_tiles *= num_groups

    for tile in tl.range(
        tl.program_id(0),
        num_tiles,
        tl.num_programs(0),
        flatten=FLATTENS,
        warp_specialize=WARP_SPECIALIZES,
    ):
        # Where the tile lies: [row, row_end) x [column, num_columns), over [begin, end).
        group, begin, end, row_end = 0, 0, depth, num_rows
        above, scales_above, out_row = 0, 0, 0
        if GROUPING == "columns":
            group = tile // (num_down * num_across)
            begin = tl.load(starts + group).to(tl.int32)
            end = tl.load(starts + group + 1).to(tl.int32)
            out_row = group * num_rows
        down, across = tile_place(tile % (num_down * num_across), num_down, num_across, WINDOW)
        row, column = down * BLOCK_M, across * (PARTS * BLOCK_N)
        if GROUPING == "rows":
            group = tl.sum((tiles_up_to <= down).to(tl.int32))
            is_mine = group_index == group
            tiles_before = tl.sum(tl.where(is_mine, tiles_up_to - tiles_of, 0))
            row = tl.sum(tl.where(is_mine, firsts, 0)) + (down - tiles_before) * BLOCK_M
            row_end = tl.sum(tl.where(is_mine, lasts, 0))
            # Experts' weights lie below one another.
            above, scales_above = group * num_columns, group * right_scale_group
        if RIGHT_SWIZZLED:
            part_scales = right_scales
        else:
            part_scales = right_scales + scales_above * right_scale_row

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc_2 = acc
        for step in tl.range(0, tl.cdiv(end - begin, BLOCK_K)):
            at = begin + step * BLOCK_K
            a = read_tile(
                left,
                row,
                at // PACKED,
                row_end,
                end // PACKED,
                left_stride,
                BLOCK_M,
                BLOCK_K // PACKED,
                USES_TMA,
            )
            a_scales = step_scales(
                left_scales,
                row,
                row_end,
                0,
                at,
                end,
                left_scale_row,
                left_scale_column,
                BLOCK_M,
                BLOCK_K,
                LEFT_BLOCK_ROWS,
                BLOCK,
                KIND,
                SCALE,
                LEFT_SWIZZLED,
            )
            acc = step_of_part(
                acc, a, a_scales, right, part_scales, above, scales_above, column,
                num_columns, at, end, right_stride, right_scale_row, right_scale_column,
                KIND, LEFT_FORMAT, RIGHT_FORMAT, SCALE, LEFT_BLOCK_ROWS, RIGHT_BLOCK_ROWS, BLOCK,
                DECODES, WIDENS, USES_TMA, RIGHT_SWIZZLED, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if PARTS == 2:
                acc_2 = step_of_part(
                    acc_2, a, a_scales, right, part_scales, above, scales_above, column + BLOCK_N,
                    num_columns, at, end, right_stride, right_scale_row, right_scale_column,
                    KIND, LEFT_FORMAT, RIGHT_FORMAT, SCALE, LEFT_BLOCK_ROWS, RIGHT_BLOCK_ROWS,
                    BLOCK, DECODES, WIDENS, USES_TMA, RIGHT_SWIZZLED, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        left_factors = left_factor + group * left_factor_group
        right_factors = right_factor + group * right_factor_group
        write_tile(
            out, acc, row, row_end, column, num_columns, out_row, out_stride, left_factors,
            right_factors, left_factor_row, right_factor_row, BLOCK_M, BLOCK_N,
            HAS_LEFT_FACTOR, HAS_RIGHT_FACTOR, ADDS,
        )  # fmt: skip
        if PARTS == 2:
            write_tile(
                out, acc_2, row, row_end, column + BLOCK_N, num_columns, out_row, out_stride,
                left_factors, right_factors, left_factor_row, right_factor_row, BLOCK_M, BLOCK_N,
                HAS_LEFT_FACTOR, HAS_RIGHT_FACTOR, ADDS,
            )  # fmt: skip
