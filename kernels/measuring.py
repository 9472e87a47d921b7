"""Decoded rows of a tile, and what is measured of them: inner products, surveys.

Sums have one fixed shape: the numbers of a block are added by halves (element j and element j + 1024, then 512 ...), so
that the bits are those of any other code that adds by halves, on any device. Those of a survey have a shape of their
own (see `STRIP`), as fixed as that.
"""

import numpy as np
from numpy.typing import NDArray

from .codes import BLOCK

__all__ = [
    "BINS",
    "ROUNDS",
    "STRIP",
    "decode_rows",
    "gram",
    "prepare",
    "prepare_survey",
    "products",
    "survey",
]

BINS = 2048
"""Bins of a histogram: at most 11 bits."""

ROUNDS = ((31, 20), (20, 9), (9, 0))
"""Which bits each round of a search looks at: from the first, not included, down to the second."""

STRIP = 256
"""A survey sums the first, fifth, ninth ... product of so many elements one after the other, so the second and so on;
then these sums of a block by halves: those of the first strip and the fifth ..., then the four."""


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


def products(sources: NDArray[np.uint64], codes: NDArray[np.uint8], begin: int, elements: int) -> NDArray[np.float64]:
    """Return the inner products of every source but the last with the last, for each block of 2,048 elements.

    Parameters
    ----------
    sources : ndarray, shape (N + 1,), uint64
        Addresses of their first elements; any alignment.
    codes : ndarray, shape (N + 1,), uint8
        Their dtypes, PAIR excluded.
    begin, elements : int
        Which elements; `begin` is that of a block.

    Returns
    -------
    ndarray, shape (ceil(elements / BLOCK), N), float64

    Notes
    -----
    Memory: 51 KiB. Releases the GIL. Each byte is read once from memory. Source: own.
    """
    from . import native
    from .native_products import ROOM, SCRATCH_BYTES

    out = np.empty((-(-elements // BLOCK), len(sources) - 1))
    native.built("products")(
        sources, codes, begin, elements, out, np.ones(1), _aligned(2, BLOCK), _aligned(1, ROOM)[0],
        np.empty(SCRATCH_BYTES, np.uint8),
    )  # fmt: skip
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
        (without a base: from the first). The counts of a block whose squares are not all finite are 0.

    Notes
    -----
    Memory: a block of every source, two of more than 16, and up to 113 KiB. Releases the GIL. Each byte is read once
    from memory. Source: own.
    """
    from . import native
    from .native_survey import ROW, SCRATCH_BYTES, SUMS, rooms, strips

    count = len(sources)
    out = np.empty((-(-elements // BLOCK), count * (count + 1) // 2 + 3))
    native.built("survey")(
        sources, codes, begin, elements, first_block, int(based), out, digests, nonfinite,
        np.ones(1), np.empty((count, BLOCK)), _aligned(strips(count), ROW), _aligned(rooms(count), SUMS),
        np.empty(count, np.uint64), np.empty(2 * 8 * count, np.uint64), np.empty(SCRATCH_BYTES, np.uint8),
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

    for name in ("decode", "gram", "products", "vector_machine"):
        native.built(name)


def prepare_survey() -> None:
    """Compile the loop of `survey`, or load it from numba's cache."""
    from . import native

    native.built("survey")
