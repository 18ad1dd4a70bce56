"""Where the numbers of a tile stand in a copy, in Triton: groups, lines, positions, stores.

A copy of the transpose is made of the same tile, turned: its lines are the tile's columns.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def grouped(tile: tl.tensor, GROUP: tl.constexpr, TURNED: tl.constexpr) -> tl.tensor:
    """[rows, columns] -> [outer, group, inner]."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    if TURNED:
        return tl.reshape(tile, (ROWS // GROUP, GROUP, COLUMNS))
    else:
        return tl.reshape(tile, (ROWS * COLUMNS // GROUP, GROUP, 1))


@triton.jit  # type: ignore[untyped-decorator]
def flat_tile(parts: tl.tensor, ROWS: tl.constexpr, TURNED: tl.constexpr) -> tl.tensor:
    """[outer, parts of a group, inner] -> [rows, parts of a row], turned [parts, columns]."""
    if TURNED:
        return tl.reshape(parts, (parts.shape[0] * parts.shape[1], parts.shape[2]))
    else:
        return tl.reshape(parts, (ROWS, parts.numel // ROWS))


@triton.jit  # type: ignore[untyped-decorator]
def line_and_place(SHAPE: tl.constexpr, TURNED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Of each number of a flat tile: its row of the copy, and its column there."""
    down = tl.arange(0, SHAPE[0])[:, None]
    across = tl.arange(0, SHAPE[1])[None, :]
    if TURNED:
        line = across
        place = down
    else:
        line = down
        place = across
    return line, place


@triton.jit  # type: ignore[untyped-decorator]
def store_tile(
    pointer: tl.tensor,
    tile: tl.tensor,
    first_line: tl.tensor,
    first_place: tl.tensor,
    num_lines: tl.tensor,
    num_places: tl.tensor,
    ROWS: tl.constexpr,
    TURNED: tl.constexpr,
) -> None:
    """A flat tile into [num_lines / ROWS, num_places], of each ROWS lines the first."""
    line, place = line_and_place(tile.shape, TURNED)
    base = pointer + (first_line // ROWS).to(tl.int64) * num_places + first_place
    mask = (line < num_lines - first_line) & (place < num_places - first_place)
    if ROWS > 1:
        mask = mask & (line % ROWS == 0)
    tl.store(base + ((line // ROWS) * num_places + place), tile, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def positions_of(
    SHAPE: tl.constexpr,
    first_line: tl.tensor,
    first_place: tl.tensor,
    num_places: tl.tensor,
    IS_LARGE: tl.constexpr,
    TURNED: tl.constexpr,
) -> tl.tensor:
    """In the copy, row by row, of the numbers of a flat tile."""
    line, place = line_and_place(SHAPE, TURNED)
    if IS_LARGE:
        return (first_line.to(tl.int64) + line) * num_places + (first_place + place)
    return (first_line + line) * num_places + (first_place + place)
