"""Means of 16-bit sources in float32, where that is exact: the same bits as in float64 at twice the speed.

A sum of numbers is exact in float32, in any order, if their magnitudes together stay below 2**24 times the last bit
of the smallest. The largest and the smallest 16-bit pattern of an element prove that; then the float64 sum is exact
too, and equal. Dividing it by a whole number d below 2**12 and rounding to float32 and again to 16 bits is harmless:
a quotient that is not midway between two 16-bit neighbours lies more than half a unit of float32 from every such
midpoint m, because s - m*d is a whole multiple of the last bit of s or of m, and so larger than m*d / 2**24.

Summing in float64 is bound by its conversions, four elements a cycle; this loop takes eight and the proof a third of
its time: 8 bfloat16 sources at 29 GB/s, division and rounding included, against 11 (Zen 3, one core, data in L1).
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .digest_vectors import absorb, counters
from .given import MULTIPLY, SLOT
from .halves import halves_from_singles, singles_from_halves
from .vectors import F32, I16, I32, I64, constant, load, part, plus, splat, store, vector

__all__ = ["LANES", "mean_bf16", "mean_f16"]

LANES = 32
"""Elements that are proved, or not, together: a cache line of each source."""

_SINGLES, _WORDS, _SHORTS = vector(F32, 8), vector(I32, 8), vector(I16, 16)


def _read_bf16(builder: Any, word: Any) -> list[Any]:
    """Return the even and the odd ones of 16 elements."""
    even = builder.shl(word, constant(I32, 8, 16))
    odd = builder.and_(word, constant(I32, 8, 0xFFFF0000))
    return [builder.bitcast(half, _SINGLES) for half in (even, odd)]


def _write_bf16(builder: Any, singles: list[Any]) -> Any:
    """Round to nearest even by adding just under half a unit, or half for an odd last bit."""
    rounded = []
    for single in singles:
        bits = builder.bitcast(single, _WORDS)
        last = builder.and_(builder.lshr(bits, constant(I32, 8, 16)), constant(I32, 8, 1))
        rounded.append(builder.add(bits, builder.add(last, constant(I32, 8, 0x7FFF))))
    even = builder.lshr(rounded[0], constant(I32, 8, 16))
    return builder.or_(even, builder.and_(rounded[1], constant(I32, 8, 0xFFFF0000)))


def _read_f16(builder: Any, word: Any) -> list[Any]:
    halves = builder.bitcast(word, _SHORTS)
    return [singles_from_halves(builder, part(builder, halves, first, 8)) for first in (0, 8)]


def _write_f16(builder: Any, singles: list[Any]) -> Any:
    halves = [halves_from_singles(builder, single) for single in singles]
    return builder.bitcast(builder.shuffle_vector(*halves, ir.Constant(vector(I32, 16), list(range(16)))), _WORDS)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_unsigned("<", a, b), a, b)


def _excess(builder: Any, a: Any, b: Any) -> Any:
    """Return a - b where that is positive, else 0: one instruction."""
    return builder.sub(_larger(builder, a, b), b)


def _unproved(builder: Any, most: list[Any], least: list[Any], gap: Any, top: Any, bottom: Any) -> Any:
    """Tell whether an element's largest and smallest magnitude break a limit."""
    far = _larger(builder, *(_excess(builder, high, low) for high, low in zip(most, least, strict=True)))
    broken = builder.or_(_excess(builder, far, gap), _excess(builder, _larger(builder, *most), top))
    broken = builder.or_(broken, _excess(builder, bottom, _smaller(builder, *least)))
    return builder.icmp_unsigned("!=", builder.bitcast(broken, ir.IntType(256)), ir.Constant(ir.IntType(256), 0))


def _keep(builder: Any, rows: list[Any], state: Any, loading: bool) -> None:
    """Load the registers of a step from `state`, or store them there."""
    for number, one in enumerate(rows):
        where = plus(builder, state, 32 * number)
        if loading:
            builder.store(load(builder, where, one.type.pointee), one)
        else:
            store(builder, builder.load(one), where)


def _maker(read: Any, write: Any) -> Any:
    @intrinsic
    def mean(
        typingctx, pointers, sources, offset, steps, out, divisor, reciprocal, mode, gap, top, bottom,
        state, fresh, last, slots,
    ):  # fmt: skip
        """Add sources to the sums of `steps` (at most 64) times LANES elements; with the last ones, write the means.

        `pointers` is the address of the sources' addresses, `offset` in bytes. Sums and extremes wait at `state`
        (256 bytes a step) for the next sources, unless these are both the first (`fresh`) and the `last`.
        `slots`, where not zero, is the address of the sources' digest sums. Returns a bit for each step that is
        not proved: its output is void.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointers, sources, offset, steps, out, divisor, reciprocal, mode, *rest = arguments
            bounds, (state, fresh, last, slots) = rest[:3], rest[3:]
            sums = [cgutils.alloca_once(builder, _SINGLES) for _ in range(4)]
            most, least = ([cgutils.alloca_once(builder, _SHORTS) for _ in range(2)] for _ in range(2))
            rows = [*sums, *most, *least]
            failed = cgutils.alloca_once_value(builder, ir.Constant(I64, 0))
            by, inverse = (splat(builder, builder.fptrunc(x, F32), 8) for x in (divisor, reciprocal))
            bounds = [splat(builder, builder.trunc(x, I16), 16) for x in bounds]
            exact = builder.icmp_signed("==", mode, ir.Constant(I64, MULTIPLY))
            fresh, last, hashing = (builder.icmp_signed("!=", x, ir.Constant(I64, 0)) for x in (fresh, last, slots))

            def add(base: Any) -> None:
                for number in range(2):
                    word = load(builder, plus(builder, base, 32 * number), _WORDS)
                    for one, value in zip(sums[2 * number : 2 * number + 2], read(builder, word), strict=True):
                        builder.store(builder.fadd(builder.load(one), value), one)
                    size = builder.and_(builder.bitcast(word, _SHORTS), constant(I16, 16, 0x7FFF))
                    builder.store(_larger(builder, builder.load(most[number]), size), most[number])
                    # A zero, which limits nothing, wraps to the largest number.
                    below = builder.sub(size, constant(I16, 16, 1))
                    builder.store(_smaller(builder, builder.load(least[number]), below), least[number])

            def begin(home: Any) -> None:
                for one in sums:
                    builder.store(constant(F32, 8, -0.0), one)
                for high, low in zip(most, least, strict=True):
                    builder.store(constant(I16, 16, 0), high)
                    builder.store(constant(I16, 16, 0xFFFF), low)
                with builder.if_then(builder.not_(fresh)):
                    _keep(builder, rows, home, True)

            def finish(step: Any, at: Any) -> None:
                bad = _unproved(builder, *([builder.load(one) for one in row] for row in (most, least)), *bounds)
                flag = builder.shl(builder.zext(bad, I64), step)
                builder.store(builder.or_(builder.load(failed), flag), failed)
                with builder.if_else(exact) as (multiply, divide):
                    with multiply:
                        for one in sums:
                            builder.store(builder.fmul(builder.load(one), inverse), one)
                    with divide:
                        for one in sums:
                            builder.store(builder.fdiv(builder.load(one), by), one)
                for number in range(2):
                    word = write(builder, [builder.load(one) for one in sums[2 * number : 2 * number + 2]])
                    store(builder, word, builder.add(out, plus(builder, at, 32 * number)))

            with cgutils.for_range(builder, steps) as step:
                at = builder.mul(step.index, ir.Constant(I64, 2 * LANES))
                home = builder.add(state, builder.mul(step.index, ir.Constant(I64, 256)))
                numbers = counters(builder, builder.mul(step.index, ir.Constant(I64, LANES // 4)), 2)
                begin(home)
                with cgutils.for_range(builder, sources) as source:
                    entry = builder.add(pointers, builder.mul(source.index, ir.Constant(I64, 8)))
                    base = builder.add(load(builder, entry, I64), builder.add(offset, at))
                    with builder.if_then(hashing):
                        slot = builder.add(slots, builder.mul(source.index, ir.Constant(I64, SLOT)))
                        absorb(builder, base, numbers, slot)
                    add(base)
                with builder.if_else(last) as (write_out, wait):
                    with write_out:
                        finish(step.index, at)
                    with wait:
                        _keep(builder, rows, home, False)
            return builder.load(failed)

        i, u, f = types.int64, types.uint64, types.float64
        return u(u, i, i, i, u, f, f, i, i, i, i, u, i, i, u), generate

    return mean


mean_bf16 = _maker(_read_bf16, _write_bf16)
mean_f16 = _maker(_read_f16, _write_f16)
