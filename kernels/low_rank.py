"""Weights with a low-rank difference added: W + s·U·V, an element at a time, in float64, rounded once."""

from .stored import entry

__all__ = ["LANES", "add_low_rank", "prepare", "spread"]

LANES = 32
"""Columns of V that lie together, row after row, in a panel: what is summed at a time stays in registers."""


def add_low_rank(
    base: int,
    code: int,
    out: int,
    count: int,
    first_column: int,
    columns: int,
    window: tuple[int, int],
    left: int,
    right: int,
    rank: int,
    scale: float,
) -> None:
    """Write those of a run of elements of W + s·U·V, row by row, that lie in a window of columns.

    Each element is ``W + s * (((u0*v0 + u1*v1) + u2*v2) + ...)``, every operation rounded to float64, and the result
    rounded to the dtype of `out`; the same bits wherever the run begins and ends.

    Parameters
    ----------
    base : int
        Address of the run's elements of W.
    code : int
        Their dtype, BF16, F16, F32 or F64; `out` is float64 for F64, else float32.
    out : int
        Address of as many elements. Changed.
    count : int
    first_column : int
        Column of the first element.
    columns : int
        Columns of a row.
    window : (int, int)
        First column, and the one after the last, of those that are written: V may be too large to be decoded whole.
    left : int
        Address of the rows of U that the run touches, float64, shape (rows, rank).
    right : int
        Address of the panels of the window's columns of V, float64, shape (ceil(columns / LANES), rank, LANES).
    rank : int
        At least 1.
    scale : float

    Notes
    -----
    Memory: none. Releases the GIL. NaNs are canonical. Source: Hu et al. 2021, arXiv 2106.09685, equation 3; order of
    operations: own.
    """
    entry("low_rank")(base, code, out, count, first_column, columns, *window, left, right, rank, scale)


def spread(
    source: int,
    code: int,
    shape: tuple[int, int],
    steps: tuple[int, int],
    target: int,
    target_steps: tuple[int, int, int],
) -> None:
    """Write numbers of a matrix as float64 at other places.

    Parameters
    ----------
    source : int
        Address; any alignment.
    code : int
        BF16, F16, F32 or F64.
    shape : (rows, columns)
    steps : (int, int)
        Elements from one row, and from one column, to the next.
    target : int
        Address of float64. Changed.
    target_steps : (int, int, int)
        Float64 numbers from one row, from one panel of LANES columns, and from one column in it to the next.

    Notes
    -----
    Memory: none. Releases the GIL. Source: own.
    """
    entry("spread")(source, code, *shape, *steps, target, *target_steps)


def prepare() -> None:
    """Compile both, or load them."""
    entry("low_rank")
    entry("spread")
