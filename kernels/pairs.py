"""Double-double arithmetic, as code to be compiled: the steps of `combine_wide`.

`torch_pairs` is the same, operation by operation. Sources: two_sum, Knuth, TAOCP 2, 4.2.2; products by splitting,
Dekker, Numer. Math. 18 (1971); sum and quotient of pairs, Hida, Li and Bailey, "Library for double-double and
quad-double arithmetic" (2007), sections 3.1 and 3.5.
"""

from __future__ import annotations

from .vector_numbers import Numbers, choose
from .vectors import I64, constant

__all__ = ["Pair", "add_pairs", "divide_pairs", "quick_two_sum", "round_scaled", "scale_of", "split", "times", "to_odd"]

Pair = tuple[Numbers, Numbers]

_HIGH = 0xFFFFFFFFF8000000


def two_sum(a: Numbers, b: Numbers) -> Pair:
    """Return a + b rounded, and the exact error."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def quick_two_sum(a: Numbers, b: Numbers) -> Pair:
    """The same where |a| >= |b|."""
    s = a + b
    return s, b - (s - a)


def split(w: Numbers) -> Pair:
    """Split into 26 bits and at most 26 signed ones; |w| < 2**990."""
    t = w * 134217729.0
    high = t - (t - w)
    return high, w - high


def times(x: Numbers, w: Numbers, parts: Pair) -> Pair:
    """Return x*w as a pair, without fused operations; `parts` is split(w).

    x is split by masking, which cannot overflow; all four partial products are exact, and the two sums that
    may need more than 53 bits keep their errors.
    """
    w_high, w_low = parts
    p = x * w
    x_high = x.masked(_HIGH)
    x_low = x - x_high
    a, a_error = two_sum(x_high * w_high - p, x_high * w_low)
    b, b_error = two_sum(a, x_low * w_high)
    return p, b + ((a_error + b_error) + x_low * w_low)


def add_pairs(a: Pair, b: Pair) -> Pair:
    """Return the sum of two pairs, relative error below 2**-104."""
    s, e = two_sum(a[0], b[0])
    t, f = two_sum(a[1], b[1])
    s, e = quick_two_sum(s, e + t)
    return quick_two_sum(s, e + f)


def divide_pairs(a: Pair, d: Pair, parts: Pair) -> Pair:
    """Return the quotient of two pairs, relative error about 2**-102; `parts` is split(d[0])."""

    def remainder(rest: Pair, q: Numbers) -> Pair:
        p, e = times(q, d[0], parts)
        return add_pairs(rest, (-p, -(e + q * d[1])))

    q1 = a[0] / d[0]
    r = remainder(a, q1)
    q2 = r[0] / d[0]
    r = remainder(r, q2)
    q3 = r[0] / d[0]
    return add_pairs(quick_two_sum(q1, q2), (q3, q3.filled(0.0)))


def scale_of(largest: Numbers) -> Numbers:
    """Return the power of two that keeps products and sums of elements up to `largest` in range.

    2**-512 above 2**500, where a sum could overflow although the mean does not; 2**512 below 2**-500, where
    the low halves would underflow.
    """
    scale = choose(largest.compare(">", 2.0**500), largest.filled(2.0**-512), largest.filled(1.0))
    return choose(largest.compare("<", 2.0**-500), largest.filled(2.0**512), scale)


def to_odd(high: Numbers, low: Numbers) -> Numbers:
    """Round a pair to odd: rounding the result again, to fewer than 52 bits, is then correct."""
    builder, bits, count = high.builder, high.bits(), high.value.type.count
    away = builder.icmp_unsigned("==", low.compare(">", 0.0), high.compare(">", 0.0))
    step = builder.select(away, constant(I64, count, 1), constant(I64, count, -1))
    last = builder.and_(bits, constant(I64, count, 1))
    even = builder.icmp_unsigned("==", last, constant(I64, count, 0))
    inexact = builder.and_(low.compare("!=", 0.0), even)
    return high.from_bits(builder.select(inexact, builder.add(bits, step), bits))


def round_scaled(high: Numbers, low: Numbers, scale: Numbers, inverse: Numbers) -> Numbers:
    """Return the pair over `scale`, rounded once: below 2**-1022 the grid of subnormals is coarser than `high`.

    Adding 2**52 grid steps rounds `high` to the grid with its exact error; only where that error is half
    a step does `low` decide.
    """
    builder, step = high.builder, 2.0**-562
    large = high.filled(2.0**-510).signed_as(high)
    s, e = two_sum(large, high)
    r = s - large
    up = builder.and_(e.compare("==", 0.5 * step), low.compare(">", 0.0))
    down = builder.and_(e.compare("==", -0.5 * step), low.compare("<", 0.0))
    r = choose(up, r + step, r)
    r = choose(down, r - step, r)
    small = (r * 2.0**-512).signed_as(high)
    tiny = builder.and_(scale.compare("==", 2.0**512), high.size().compare("<", 2.0**-510))
    return choose(tiny, small, high * inverse)
