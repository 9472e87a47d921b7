"""The rare path, compiled: count what is not finite in one block, and make its NaNs canonical."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

import numba
import numpy as np

from .codes import CANONICAL_NAN, ITEMSIZE, NONFINITE_MASK, NONFINITE_VALUE
from .lanes import load_u8, load_u16, load_u32, load_u64, store_u8, store_u16, store_u32, store_u64

__all__ = ["canonical_nans", "is_bad", "mark_bad"]

_MASKS = np.array(NONFINITE_MASK, dtype=np.uint64)
_VALUES = np.array(NONFINITE_VALUE, dtype=np.uint64)
_NANS = np.array(CANONICAL_NAN, dtype=np.uint64)
_SIZES = np.array(ITEMSIZE, dtype=np.int64)


@numba.njit(nogil=True)
def is_bad(address, code):
    """Tell whether the element at `address` is NaN or infinite (a PAIR by its high half)."""
    size = _SIZES[code]
    if size == 1:
        bits = load_u8(address)
    elif size == 2:
        bits = load_u16(address)
    elif size == 4:
        bits = load_u32(address)
    else:
        bits = load_u64(address)
    return (bits & _MASKS[code]) == _VALUES[code]


@numba.njit(nogil=True)
def mark_bad(address, code, count, marks):
    """Set byte j at the address `marks` where element j is not finite, and return how many are."""
    found = 0
    size = np.uint64(_SIZES[code])
    for j in range(count):
        if is_bad(address + np.uint64(j) * size, code):
            store_u8(marks + np.uint64(j), np.uint64(1))
            found += 1
    return found


@numba.njit(nogil=True)
def canonical_nans(address, code, count):
    """Overwrite every NaN of a 16, 32 or 64-bit block with the canonical one."""
    mask, nan = _MASKS[code], _NANS[code]
    for j in range(count):
        if code == 3:
            here = address + np.uint64(8 * j)
            if load_u64(here) & np.uint64(0x7FFFFFFFFFFFFFFF) > mask:
                store_u64(here, nan)
        elif code == 2:
            here = address + np.uint64(4 * j)
            if load_u32(here) & np.uint64(0x7FFFFFFF) > mask:
                store_u32(here, nan)
        else:
            here = address + np.uint64(2 * j)
            if load_u16(here) & np.uint64(0x7FFF) > mask:
                store_u16(here, nan)
