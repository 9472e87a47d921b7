"""Decoded rows of a tile, and what is measured of them: inner products, histograms; and random numbers beside them.

Sums have one fixed shape: the numbers of a block are added by halves (element j and element j + 1024, then 512 ...), so
that the bits are those of any other code that adds by halves, on any device.
"""

import numpy as np
from numpy.typing import NDArray

from .codes import BLOCK

__all__ = [
    "BINS",
    "ROUNDS",
    "decode_rows",
    "gram",
    "halves",
    "histograms",
    "prepare",
    "prepare_survey",
    "survey",
    "uniform",
]

BINS = 2048
"""Bins of a histogram: at most 11 bits."""

ROUNDS = ((31, 20), (20, 9), (9, 0))
"""Which bits each round of a search looks at: from the first, not included, down to the second."""


def decode_rows(
    sources: NDArray[np.uint64], codes: NDArray[np.uint8], begin: int, count: int, out: NDArray[np.float64]
) -> None:
    """Write `count` elements of every source, from its element `begin` on, as float64.

    Parameters
    ----------
    sources : ndarray, shape (N,), uint64
        Addresses of their first elements; any alignment.
    codes : ndarray, shape (N,), uint8
        Their dtypes, PAIR excluded.
    begin, count : int
    out : ndarray, shape (N, at least count), float64
        Changed.

    Notes
    -----
    Memory: 17 KiB. Releases the GIL. Source: own.
    """
    from . import native
    from .native_measuring import SCRATCH_BYTES

    native.built("decode")(sources, codes, begin, count, out, np.ones(1), np.empty(SCRATCH_BYTES, np.uint8))


def halves(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add the elements of each block by halves; shape (..., n) becomes (..., blocks)."""
    length = rows.shape[-1]
    blocks = -(-length // BLOCK)
    if length % BLOCK:
        rows = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, blocks * BLOCK - length)])
    rows = rows.reshape(*rows.shape[:-1], blocks, BLOCK)
    while (half := rows.shape[-1] // 2) > 0:
        rows = rows[..., :half] + rows[..., half:]
    return rows[..., 0]


def gram(rows: NDArray[np.float64], centre: int | None) -> NDArray[np.float64]:
    """Return the inner products of rows, or of their differences from row `centre`, for each block of 2,048 elements.

    Parameters
    ----------
    rows : ndarray, shape (N, n), float64, C-contiguous
    centre : int or None

    Returns
    -------
    ndarray, shape (ceil(n / BLOCK), N, N), float64

    Notes
    -----
    Memory: a block of every row. Releases the GIL. Source: own.
    """
    from . import native

    count, n = rows.shape
    out = np.empty((-(-n // BLOCK), count, count))
    native.built("gram")(rows, -1 if centre is None else centre, out, np.empty(BLOCK // 2), np.empty((count, BLOCK)))
    return out


def histograms(keys: NDArray[np.float32], number: int, prefixes: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Count keys by some of their bits, among those that begin with a prefix.

    Parameters
    ----------
    keys : ndarray, shape (M, n), float32
        Not negative.
    number : int
        Which of ROUNDS.
    prefixes : ndarray, shape (M, K), uint32
        The bits above those that are looked at; not used in the first round.

    Returns
    -------
    ndarray, shape (M, K, BINS), int64

    Notes
    -----
    Releases the GIL. Source: own, a radix search.
    """
    from . import native

    out = np.zeros((*prefixes.shape, BINS), np.int64)
    native.built("histograms")(np.ascontiguousarray(keys).view(np.uint32), *ROUNDS[number], prefixes, out)
    return out


def uniform(keys: NDArray[np.uint64], start: int, count: int) -> NDArray[np.float64]:
    """Return random numbers in [0, 1): number `start + j` of the stream with key `keys[r]`, shape (R, count).

    Notes
    -----
    Releases the GIL. Source: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose n-th number needs no other.
    """
    from . import native

    out = np.empty((len(keys), count))
    native.built("uniform")(keys, start, out)
    return out


def survey(
    sources: NDArray[np.uint64],
    codes: NDArray[np.uint8],
    begin: int,
    elements: int,
    first_block: int,
    *,
    based: bool,
    digests: NDArray[np.uint64],
    nonfinite: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Measure all of some elements of every source: how large and how far apart they are, block by block.

    Parameters
    ----------
    sources : ndarray, shape (N,), uint64
        Addresses of their first elements; any alignment.
    codes : ndarray, shape (N,), uint8
        Their dtypes, PAIR excluded.
    begin, elements : int
        Which elements; `begin` is that of a block.
    first_block : int
        Number in the tensor of the first of them.
    based : bool
        The first source is the base of the others, and not one of them.
    digests : ndarray, shape (N,), uint64
        Changed: the digests of the blocks are added.
    nonfinite : ndarray, shape (N,), int64
        Changed: NaN and infinite elements are added.

    Returns
    -------
    ndarray, shape (ceil(elements / BLOCK), N (N + 1) / 2 + 3), float64
        For each block the lower triangle, row by row, of the inner products of the first source and of the
        differences of the others from it; then how many elements are not the same in all of those that are compared,
        in how many one of them differs from the base, and in how many two differ from it in opposite directions
        (without a base: from the first).

    Notes
    -----
    Memory: a block of every source, and 33 KiB. Releases the GIL. Each byte is read once from memory. Source: own.
    """
    from . import native
    from .native_survey import ROOM, SCRATCH_BYTES, rooms, row_elements

    count = len(sources)
    out = np.empty((-(-elements // BLOCK), count * (count + 1) // 2 + 3))
    native.built("survey")(
        sources, codes, begin, elements, first_block, int(based), out, digests, nonfinite,
        np.ones(1), np.empty((count, BLOCK)), _aligned(count, row_elements(count)), _aligned(rooms(count), ROOM),
        np.empty(count, np.uint64), np.empty(SCRATCH_BYTES, np.uint8),
    )  # fmt: skip
    return out


def _aligned(rows: int, columns: int) -> NDArray[np.float64]:
    """Make an array that begins a cache line: vectors that straddle two cost the products 40 %."""
    room = np.empty(rows * columns + 8)
    first = -room.ctypes.data % 64 // 8
    return room[first : first + rows * columns].reshape(rows, columns)


def prepare() -> None:
    """Compile everything here but `survey`, or load it from numba's cache."""
    from . import native

    for name in ("decode", "gram", "histograms", "uniform", "halves", "vector_machine"):
        native.built(name)


def prepare_survey() -> None:
    """Compile the loop of `survey`, or load it from numba's cache."""
    from . import native

    native.built("survey")
