"""Where the scales of a tensor lie over its elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_BLOCK = (128, 128)
Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Grid:
    """Blocks over a stack of matrices, from the first element of each on; those at its ends are cut off.

    Attributes
    ----------
    rows, columns : int
        Of each matrix, at least 1.
    block_rows, block_columns : int
    """

    rows: int
    columns: int
    block_rows: int
    block_columns: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """As the kernels want them."""
        return self.rows, self.columns, self.block_rows, self.block_columns

    @property
    def line(self) -> int:
        """How many blocks are side by side."""
        return -(-self.columns // self.block_columns)

    @property
    def lines(self) -> int:
        """How many lines of blocks a matrix has."""
        return -(-self.rows // self.block_rows)

    def line_of(self, element: int) -> int:
        """Return in which line of blocks an element of the stack lies."""
        matrix, row = divmod(element // self.columns, self.rows)
        return matrix * self.lines + row // self.block_rows

    def first_of(self, line: int) -> int:
        """Return the first element of a line of blocks."""
        matrix, inner = divmod(line, self.lines)
        return (matrix * self.rows + inner * self.block_rows) * self.columns

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Return the first scale, and the number of scales, of the lines in which some elements lie."""
        start = self.line_of(first)
        return start * self.line, (self.line_of(first + count - 1) - start + 1) * self.line

    def piece(self, first: int, most: int, most_scales: int) -> tuple[int, int, int]:
        """Return how many elements from `first` on go together, and which scales: the first, and how many.

        Parameters
        ----------
        first : int
        most, most_scales : int
            So many elements and scales at most.
        """
        lines = most_scales // self.line
        if lines:
            count = min(most, self.first_of(self.line_of(first) + lines) - first)
            return count, *self.span(first, count)
        column = first % self.columns  # the scales of one line are too many
        block = column // self.block_columns
        count = min(most, min((block + most_scales) * self.block_columns, self.columns) - column)
        scales = (column + count - 1) // self.block_columns - block + 1
        return count, self.line_of(first) * self.line + block, scales


def block_grid(shape: Sequence[int], block: Block) -> Grid:
    """Cover the matrices of a tensor, the last two of its dimensions, with blocks."""
    return Grid(max(1, shape[-2]), max(1, shape[-1]), *block)


def grid_of(shape: Sequence[int], scale_shape: Sequence[int], block: Block, *, may_repeat: bool) -> Grid | None:
    """Find out how scales lie over a tensor; None: in no way that is known.

    Parameters
    ----------
    shape, scale_shape : sequence of int
    block : (int, int)
    may_repeat : bool
        Whether a matrix may have one scale for each row, each column or all of it, where blocks are smaller.
    """
    if len(scale_shape) <= 1 and math.prod(scale_shape) == 1:
        elements = max(1, math.prod(shape))
        return Grid(1, elements, 1, elements)
    if len(shape) not in (2, 3):
        return None
    if may_repeat and len(shape) == 2 and tuple(scale_shape) == (shape[0],):
        scale_shape = (shape[0], 1)
    whole = (max(1, shape[-2]), max(1, shape[-1]))
    repeated = (whole, (1, whole[1]), (whole[0], 1)) if may_repeat else ()
    for sizes in (block, *repeated):
        grid = block_grid(shape, sizes)
        counts = [-(-size // step) for size, step in zip(shape[-2:], sizes, strict=True)]  # 0 of nothing
        if tuple(scale_shape) in {(*shape[:-2], grid.lines, grid.line), (*shape[:-2], *counts)}:
            return grid
    return None
