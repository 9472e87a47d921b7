"""The range of magnitudes in a tile: what decides whether float64 sums of it are exact in any order."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from .codes import BF16, F8_E4M3, F8_E4M3FNUZ, F8_E5M2, F8_E5M2FNUZ, F16, F32, F64, NONFINITE_MASK, NONFINITE_VALUE

__all__ = ["extent"]

# Mantissa bits and exponent bias, by code.
_FORMATS = {
    BF16: (7, 127),
    F16: (10, 15),
    F32: (23, 127),
    F64: (52, 1023),
    F8_E4M3: (3, 7),
    F8_E5M2: (2, 15),
    F8_E4M3FNUZ: (3, 8),
    F8_E5M2FNUZ: (2, 16),
}


@numba.njit(nogil=True, cache=True)
def _largest_and_smallest(bits: Any, mask: Any) -> Any:
    # numba widens small integers in arithmetic; wrapping every step keeps the vectors full.
    cast = bits.dtype.type
    one = cast(1)
    largest = cast(0)
    smallest = mask
    minus_zero = cast(~mask)
    negative = False
    for j in range(len(bits)):
        magnitude = cast(bits[j] & mask)
        largest = max(largest, magnitude)
        # Zero wraps to the largest number and so never wins: no branch in the loop.
        smallest = min(smallest, cast(magnitude - one))
        negative |= bits[j] == minus_zero
    return largest, smallest, negative


def extent(raw: NDArray[np.uint8], code: int) -> tuple[int, int, bool]:
    """Return exponents that bound the elements of a tile.

    Parameters
    ----------
    raw : ndarray, shape (bytes,), uint8
        The elements, of the dtype `code`.
    code : int

    Returns
    -------
    above, unit : int
        Every element is smaller in magnitude than 2**above and a multiple of 2**unit; -5000 and 5000 where all are
        zero, 5000 and -5000 where one is not finite.
    negative_zero : bool
        Whether an element is -0.0.

    Notes
    -----
    Memory: none. Reads each byte once. Source: own.
    """
    mantissa, bias = _FORMATS[code]
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    itemsize = {BF16: 2, F16: 2, F32: 4, F64: 8}.get(code, 1)
    kind = width[itemsize]
    bits = raw.view(kind) if raw.ctypes.data % itemsize == 0 else raw.copy().view(kind)
    limit = (1 << (8 * itemsize - 1)) - 1
    mask = kind(limit)
    largest, smallest, negative = (int(x) for x in _largest_and_smallest(bits, mask))
    if largest == 0:
        return -5000, 5000, bool(negative)
    if largest & NONFINITE_MASK[code] & limit == NONFINITE_VALUE[code] & limit and NONFINITE_VALUE[code] != 0x80:
        return 5000, -5000, bool(negative)
    above = max(largest >> mantissa, 1) - bias + 1
    unit = max((smallest + 1) >> mantissa, 1) - bias - mantissa
    return above, unit, bool(negative)
