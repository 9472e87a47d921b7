"""From quotients to the bytes of a block, compiled."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

import numba
import numpy as np

from .codes import BF16, BLOCK, F16, F32, F64, ITEMSIZE, PAIR
from .inspection import canonical_nans, mark_bad
from .lanes import as_bits, as_float, load_f64, load_u8, load_u64, store_u8, store_u64
from .rounding import finish_bf16, finish_f16, finish_f32, finish_f64

__all__ = ["encode_f8", "finish", "inspect", "move_bytes", "only_second"]

_SIZES = np.array(ITEMSIZE, dtype=np.int64)


@numba.njit(nogil=True)
def encode_f8(acc, count, out, row, reals, integers):
    """Round float64 quotients to an 8-bit format and return how many are not finite there."""
    smallest, largest = reals[row, 0], reals[row, 1]
    mantissa, nan = integers[row, 0], np.uint64(integers[row, 1])
    infinity, signed_zero = np.uint64(integers[row, 2]), integers[row, 3]
    drop = np.uint64(52 - mantissa)
    # 2.0 ** (52 - mantissa); the operator would call the C library (see `stored`).
    large = 1.5 * as_float(np.uint64(1023 + 52 - mantissa) << np.uint64(52))
    normal_step = np.uint64(1) << np.uint64(mantissa)
    base = as_bits(smallest) >> drop
    found = 0
    for j in range(count):
        value = load_f64(acc + np.uint64(8 * j))
        bits = as_bits(value)
        sign = (bits >> np.uint64(56)) & np.uint64(0x80)
        size = abs(value)
        power = min(max(as_float(bits & np.uint64(0x7FF0000000000000)), smallest), 2.0**200) * large
        size = (size + power) - power
        if size != size:
            result = nan
        elif size > largest:
            result = infinity | sign if infinity != nan else nan
        elif size < smallest:
            result = (as_bits(size + smallest) >> drop) - base
            result = result | sign if signed_zero or result else result
        else:
            result = ((as_bits(size) >> drop) - base + normal_step) | sign
        if not size <= largest:
            found += 1
        store_u8(out + np.uint64(j), result)
    return found


@numba.njit(nogil=True, inline="always")
def finish(acc, count, out, out_code, division, encoder):
    """Divide and round accumulators, and tell whether a result is not finite; 8-bit outputs spoil `acc`."""
    divisor, reciprocal, mode = division
    reals, integers = encoder
    if out_code == BF16:
        return finish_bf16(acc, count, out, divisor, reciprocal, mode)
    if out_code == F16:
        return finish_f16(acc, count, out, divisor, reciprocal, mode)
    if out_code == F32:
        return finish_f32(acc, count, out, divisor, reciprocal, mode)
    if out_code == F64:
        return finish_f64(acc, count, out, divisor, reciprocal, mode)
    finish_f64(acc, count, acc, divisor, reciprocal, mode)
    return encode_f8(acc, count, out, out_code - 4, reals, integers)


@numba.njit(nogil=True, inline="always")
def inspect(sources, codes, begin, count, out, out_code, nonfinite, marks):
    """Count what is not finite in one block, and return where only the output is; NaNs become canonical.

    `marks` is the address of two blocks of bytes.
    """
    clean = marks + np.uint64(BLOCK)
    for j in range(2 * BLOCK):
        store_u8(marks + np.uint64(j), np.uint64(0))
    for k in range(len(sources)):
        code = np.int64(codes[k])
        where = sources[k] + np.uint64(begin * _SIZES[code])
        nonfinite[k] += mark_bad(where, code, count, marks)
    code, items = out_code, count
    if out_code == PAIR:
        code, items = np.int64(F64), 2 * count
    if code <= F64:
        canonical_nans(out, code, items)
    mark_bad(out, out_code, count, clean)
    return only_second(marks, clean, count)


@numba.njit(nogil=True)
def only_second(marks, clean, count):
    """Return how many of `count` bytes are set at `clean` and not at `marks`."""
    found = np.int64(0)
    for j in range(count):
        found += np.int64(load_u8(clean + np.uint64(j)) & ~load_u8(marks + np.uint64(j)))
    return found


@numba.njit(nogil=True)
def move_bytes(source, target, nbytes):
    """Copy a block between addresses that do not overlap."""
    for j in range(nbytes >> 3):
        store_u64(target + np.uint64(8 * j), load_u64(source + np.uint64(8 * j)))
    for j in range(nbytes & ~7, nbytes):
        store_u8(target + np.uint64(j), load_u8(source + np.uint64(j)))
