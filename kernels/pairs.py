"""Double-double arithmetic, compiled: the steps of `combine_wide` (`torch_pairs` is the same, operation by operation).

Sources: two_sum, Knuth, TAOCP 2, 4.2.2; products by splitting, Dekker, Numer. Math. 18 (1971); sum and quotient of
pairs, Hida, Li and Bailey, "Library for double-double and quad-double arithmetic" (2007), sections 3.1 and 3.5.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

import math

import numba
import numpy as np

from .lanes import as_bits, as_float

__all__ = ["add_pairs", "divide_pairs", "round_scaled", "scale_of", "split", "times", "to_odd"]

_HIGH = np.uint64(0xFFFFFFFFF8000000)
_ONE = np.uint64(1)


@numba.njit(nogil=True)
def two_sum(a, b):
    """Return a + b rounded, and the exact error."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@numba.njit(nogil=True)
def quick_two_sum(a, b):
    """The same where |a| >= |b|."""
    s = a + b
    return s, b - (s - a)


@numba.njit(nogil=True)
def split(w):
    """Split into 26 bits and at most 26 signed ones; |w| < 2**990."""
    t = 134217729.0 * w
    high = t - (t - w)
    return high, w - high


@numba.njit(nogil=True)
def times(x, w, w_high, w_low):
    """Return x*w as a pair, without fused operations.

    x is split by masking, which cannot overflow; all four partial products are exact, and the two sums that
    may need more than 53 bits keep their errors.
    """
    p = x * w
    x_high = as_float(as_bits(x) & _HIGH)
    x_low = x - x_high
    a, a_error = two_sum(x_high * w_high - p, x_high * w_low)
    b, b_error = two_sum(a, x_low * w_high)
    return p, b + ((a_error + b_error) + x_low * w_low)


@numba.njit(nogil=True)
def add_pairs(a, a_low, b, b_low):
    """Return the sum of two pairs, relative error below 2**-104."""
    s, e = two_sum(a, b)
    t, f = two_sum(a_low, b_low)
    s, e = quick_two_sum(s, e + t)
    return quick_two_sum(s, e + f)


@numba.njit(nogil=True)
def divide_pairs(a, a_low, d, d_low, d_high_part, d_low_part):
    """Return the quotient of two pairs, relative error about 2**-102; the last two are split(d)."""
    q1 = a / d
    p, e = times(q1, d, d_high_part, d_low_part)
    r, r_low = add_pairs(a, a_low, -p, -(e + q1 * d_low))
    q2 = r / d
    p, e = times(q2, d, d_high_part, d_low_part)
    r, r_low = add_pairs(r, r_low, -p, -(e + q2 * d_low))
    q3 = r / d
    q1, q2 = quick_two_sum(q1, q2)
    return add_pairs(q1, q2, q3, 0.0)


@numba.njit(nogil=True)
def scale_of(largest):
    """Return the power of two that keeps products and sums of elements up to `largest` in range.

    2**-512 above 2**500, where a sum could overflow although the mean does not; 2**512 below 2**-500, where
    the low halves would underflow.
    """
    if largest > 2.0**500:
        return 2.0**-512
    if largest < 2.0**-500:
        return 2.0**512
    return 1.0


@numba.njit(nogil=True)
def to_odd(high, low):
    """Round a pair to odd: rounding the result again, to fewer than 52 bits, is then correct."""
    bits = as_bits(high)
    if low != 0.0 and bits & _ONE == 0:
        bits = bits + _ONE if (low > 0.0) == (high > 0.0) else bits - _ONE
    return as_float(bits)


@numba.njit(nogil=True)
def round_scaled(high, low, scale):
    """Return the pair over `scale`, rounded once: below 2**-1022 the grid of subnormals is coarser than `high`.

    Adding 2**52 grid steps rounds `high` to the grid with its exact error; only where that error is half
    a step does `low` decide.
    """
    if scale == 2.0**512 and abs(high) < 2.0**-510:
        step = 2.0**-562
        large = math.copysign(2.0**-510, high)
        s, e = two_sum(large, high)
        r = s - large
        if e == 0.5 * step and low > 0.0:
            r += step
        elif e == -0.5 * step and low < 0.0:
            r -= step
        return math.copysign(r * 2.0**-512, high)
    return high / scale
