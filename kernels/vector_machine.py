"""A small machine for elementwise programs: vector instructions on strips of rows, compiled once for all programs.

What numpy does in one call for each operation, it does for strips that stay in the L1 and L2 caches, in one call for
the whole program, without Python's lock. Instructions are IEEE operations on float64, one by one and not contracted, so
the bits are those of numpy and of torch.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from .codes import BLOCK
from .measuring import BINS, ROUNDS

__all__ = [
    "FIELDS",
    "STRIP",
    "TO_COUNTS",
    "TO_ROWS",
    "TO_SUMS",
    "Code",
    "Op",
    "Stretch",
    "to_counts",
    "to_rows",
    "to_sums",
]

STRIP = 256
"""Elements of a row that an instruction handles at a time."""

FIELDS = 9
"""Numbers of an instruction: op, first row of the result, rows; then first row of an operand, and 1 if it has as many
rows or 0 if its one row serves all, three times. LOAD: row of the input, which input; UNIFORM: the first stream."""


class Op(IntEnum):
    """Instructions. Truth is 1.0, and its absence 0.0."""

    LOAD = 0
    ADD = 1
    SUBTRACT = 2
    MULTIPLY = 3
    DIVIDE = 4
    LESS = 5
    LESS_EQUAL = 6
    EQUAL = 7
    BOTH = 8
    EITHER = 9
    NOT = 10
    WHERE = 11
    ABSOLUTE = 12
    NEGATIVE = 13
    SIGN = 14
    SQRT = 15
    SINGLE = 16
    TOTAL = 17
    MOVE = 18
    UNIFORM = 19
    STORE = 20


TO_ROWS, TO_SUMS, TO_COUNTS = 0, 1, 2


@dataclass(frozen=True)
class Stretch:
    """Elements of a tensor in all checkpoints.

    Attributes
    ----------
    sources : ndarray, shape (N,), uint64
        Addresses of the first element of the tile; any alignment.
    codes : ndarray, shape (N,), uint8
        Their dtypes, PAIR excluded.
    begin, count : int
        Which elements of the tile.
    start : int
        Place in the tensor of the first of them.
    """

    sources: NDArray[np.uint64]
    codes: NDArray[np.uint8]
    begin: int
    count: int
    start: int


@dataclass(frozen=True)
class Code:
    """A program.

    Attributes
    ----------
    lines : ndarray, shape (instructions, FIELDS), int64
    constants : ndarray, shape (C,), float64
        Fill the first C rows of the machine.
    height : int
        Rows of the machine.
    outputs : int
        Rows of the result.
    """

    lines: NDArray[np.int64]
    constants: NDArray[np.float64]
    height: int
    outputs: int


def to_rows(
    code: Code, stretch: Stretch, keys: NDArray[np.uint64], outside: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Run a program over elements of checkpoints.

    Parameters
    ----------
    code : Code
    stretch : Stretch
    keys : ndarray, shape (streams,), uint64
        Of random numbers.
    outside : ndarray, shape (K, count), float64
        Rows that were computed elsewhere.

    Returns
    -------
    result : ndarray, shape (outputs, count), float64
    bad : ndarray, shape (N + 1,), int64
        NaN and infinite elements of each checkpoint, and of the result.

    Notes
    -----
    Memory: `height` strips. Releases the GIL once. Source: own.
    """
    out = np.empty((code.outputs, stretch.count))
    bad = _run(code, stretch, keys, outside, TO_ROWS, out)
    return out, bad


def to_sums(
    code: Code, stretch: Stretch, keys: NDArray[np.uint64], outside: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the sum over each block, by halves, shape (outputs, blocks). See `to_rows`, `measuring`."""
    out = np.empty((code.outputs, -(-stretch.count // BLOCK)))
    _run(code, stretch, keys, outside, TO_SUMS, out)
    return out


def to_counts(
    code: Code,
    stretch: Stretch,
    keys: NDArray[np.uint64],
    outside: NDArray[np.float64],
    number: int,
    prefixes: NDArray[np.uint32],
) -> NDArray[np.int64]:
    """Return the histograms of the results as float32, shape (outputs, K, BINS). See `measuring.histograms`."""
    counts = np.zeros((*prefixes.shape, BINS), np.int64)
    _run(code, stretch, keys, outside, TO_COUNTS, np.empty((0, 0)), ROUNDS[number], prefixes, counts)
    return counts


def _run(
    code: Code,
    stretch: Stretch,
    keys: NDArray[np.uint64],
    outside: NDArray[np.float64],
    mode: int,
    out: NDArray[np.float64],
    bits: tuple[int, int] = (31, 20),
    prefixes: NDArray[np.uint32] | None = None,
    counts: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    from . import native
    from .native_machine import SCRATCH_BYTES

    bad = np.zeros(len(stretch.sources) + 1, np.int64)
    block = np.empty((code.outputs, BLOCK)) if mode else np.empty((0, 0))
    native.built("vector_machine")(
        code.lines, code.constants, stretch.sources, stretch.codes, stretch.begin, stretch.count, outside, keys,
        stretch.start, mode, out, *bits, np.empty((0, 0), np.uint32) if prefixes is None else prefixes,
        np.empty((0, 0, 0), np.int64) if counts is None else counts,
        np.empty((code.height + BLOCK // 2 // STRIP, STRIP)), block, bad, np.ones(1),
        np.empty(SCRATCH_BYTES, np.uint8), np.empty(BLOCK, np.float32),
    )  # fmt: skip
    return bad
