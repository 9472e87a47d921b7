"""The compiled loop behind `combine_single`: every product, sum and quotient rounded to float32.

It exists so that a CPU gives the bits of a GPU that sums in float32. It is not tuned: each source is widened to float64
in the first-level cache, where float32 numbers, their products and sums are rounded (once: 53 bits are more than twice
24 and two, so a float64 operation rounded to float32 is the float32 operation).
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator,call-arg"

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from .codes import BLOCK, ITEMSIZE
from .finishing import finish, inspect, move_bytes
from .given import MULTIPLY
from .hashing import block_digest
from .lanes import as_bits, load_f64, store_u64
from .native_wide import widen

__all__ = ["build_single", "single_scratch"]

_SIZES = np.array(ITEMSIZE, dtype=np.int64)

# Where in the scratch lie, in bytes: the sums, at 0; a widened source; a block of output, for work in place; marks.
_ROW = 8 * BLOCK
_SPARE, _MARKS, _END = 2 * _ROW, 3 * _ROW, 3 * _ROW + 2 * BLOCK


def single_scratch() -> NDArray[np.uint8]:
    """Return the memory that the loop works in; the caller holds it."""
    return np.empty(_END, np.uint8)


@numba.njit(nogil=True)
def _add(row, weight, count, acc, fresh):
    """Add a widened source times its weight."""
    by = np.float32(weight)
    for j in range(count):
        here = acc + np.uint64(8 * j)
        total = np.float32(load_f64(row + np.uint64(8 * j))) * by
        if not fresh:
            total = np.float32(load_f64(here)) + total
        store_u64(here, as_bits(np.float64(total)))


@numba.njit(nogil=True)
def _divide(acc, count, divisor):
    by = np.float32(divisor)
    for j in range(count):
        here = acc + np.uint64(8 * j)
        store_u64(here, as_bits(np.float64(np.float32(load_f64(here)) / by)))


def build_single(signature: Any, stamp: int) -> Any:
    """Compile the loop, or load it from numba's cache."""

    @numba.njit(signature, nogil=True, cache=True, error_model="numpy")
    def loop(
        sources, codes, weights, divisor, elements, first_block, out, out_code,
        hashed, digests, nonfinite, tables, reals, integers, scratch,
    ):  # fmt: skip
        overflowed = np.int64(stamp) & 0
        acc = np.uint64(scratch.ctypes.data)
        row, size, in_place = acc + np.uint64(_ROW), _SIZES[out_code], False
        for k in range(len(sources)):
            in_place |= sources[k] == out
        for block in range((elements + BLOCK - 1) // BLOCK):
            begin = block * BLOCK
            count = min(BLOCK, elements - begin)
            target = out + np.uint64(begin * size)
            goal = acc + np.uint64(_SPARE) if in_place else target
            for k in range(len(sources)):
                code = np.int64(codes[k])
                where = sources[k] + np.uint64(begin * _SIZES[code])
                if hashed[k]:
                    digests[k] += block_digest(where, count * _SIZES[code], first_block + block)
                widen(where, code, count, count, row, tables)
                _add(row, weights[k], count, acc, k == 0)
            _divide(acc, count, divisor)
            if finish(acc, count, goal, out_code, (1.0, 1.0, MULTIPLY), (reals, integers)):
                overflowed += inspect(sources, codes, begin, count, goal, out_code, nonfinite, acc + np.uint64(_MARKS))
            if in_place:
                move_bytes(goal, target, count * size)
        return overflowed

    return loop
