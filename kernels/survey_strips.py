"""A strip of all sources, decoded and centred; on the way it is digested, and elements that differ are counted.

Counts are of the numbers themselves, as integers of the same order: sixteen bfloat16 in a vector, where their
differences in float64 are four. A cache line of each source is taken in turn. Prefetching the next block cost a
tenth of the time, from memory too.

16-bit numbers that lie near enough to one another have differences that float32 holds: such a strip takes half of the
room, and none of its products is rounded in float64.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator,call-arg"

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .codes import BF16, F16, F32
from .digest_vectors import absorb, counters
from .given import SLOT
from .halves import singles_from_halves
from .survey_products import ROW
from .vectors import F32 as SINGLE
from .vectors import F64 as DOUBLE
from .vectors import I16, I32, I64, constant, load, part, plus, store, vector

__all__ = ["centre", "centre_again"]

_LINE = 64
_FOUR, _EIGHT = vector(DOUBLE, 4), vector(SINGLE, 8)


def _bf16(builder: Any, words: Any) -> list[Any]:
    """Each word becomes the upper half of a float32."""
    zeros, found = constant(I16, 8, 0), []
    for eight in (part(builder, words, 0, 8), part(builder, words, 8, 8)):
        for first in (0, 4):
            order = [n for lane in range(first, first + 4) for n in (lane, 8 + lane)]
            pairs = builder.shuffle_vector(zeros, eight, ir.Constant(vector(I32, 8), order))
            found.append(builder.fpext(builder.bitcast(pairs, vector(SINGLE, 4)), _FOUR))
    return found


def _bf16_as_f32(builder: Any, words: Any) -> list[Any]:
    wide = [builder.zext(part(builder, words, n, 8), vector(I32, 8)) for n in (0, 8)]
    return [builder.bitcast(builder.shl(one, constant(I32, 8, 16)), _EIGHT) for one in wide]


def _f16(builder: Any, words: Any) -> list[Any]:
    fours = [part(builder, words, n, 4) for n in (0, 4, 8, 12)]
    return [builder.fpext(singles_from_halves(builder, four), _FOUR) for four in fours]


def _f16_as_f32(builder: Any, words: Any) -> list[Any]:
    return [singles_from_halves(builder, part(builder, words, n, 8)) for n in (0, 8)]


def _f32(builder: Any, words: Any) -> list[Any]:
    singles = builder.bitcast(words, _EIGHT)
    return [builder.fpext(part(builder, singles, n, 4), _FOUR) for n in (0, 4)]


def _f64(builder: Any, words: Any) -> list[Any]:
    return [builder.bitcast(words, _FOUR)]


class _Bounds:
    """The least and the greatest of several vectors, lane by lane, for each of two vectors side by side."""

    def __init__(self, builder: Any, kind: Any, *, signed: bool) -> None:
        self._builder = builder
        self._less = builder.icmp_signed if signed else builder.icmp_unsigned
        self.lows, self.highs = ([cgutils.alloca_once(builder, kind) for _ in range(2)] for _ in range(2))

    def begin(self, lows: list[Any], highs: list[Any]) -> None:
        for bound, one in zip([*self.lows, *self.highs], [*lows, *highs], strict=True):
            self._builder.store(one, bound)

    def take(self, lows: list[Any], highs: list[Any]) -> None:
        for bounds, relation, ones in (self.lows, "<", lows), (self.highs, ">", highs):
            for bound, one in zip(bounds, ones, strict=True):
                old = self._builder.load(bound)
                self._builder.store(self._builder.select(self._less(relation, one, old), one, old), bound)

    def pairs(self) -> list[tuple[Any, Any]]:
        return [(self._builder.load(a), self._builder.load(b)) for a, b in zip(self.lows, self.highs, strict=True)]


def _centrer(itemsize: int, read: Any, near: tuple[int, int] | None = None) -> Any:
    """Make a loop over a strip. `near`: see `_GAPS`; `read` then gives float32."""
    bits, many = 8 * itemsize, 32 // itemsize
    kind, most = vector(ir.IntType(bits), many), (1 << (bits - 1)) - 1
    gap, top = near or (0, 0)
    values_kind, value_bytes = (_EIGHT, 4) if near else (_FOUR, 8)

    def every(value: int) -> Any:
        return constant(kind.element, many, value)

    def sized(builder: Any, words: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return magnitudes less one, of which that of zero is the largest as it leaves nothing to round, and those."""
        sizes = [builder.and_(one, every(most)) for one in words]
        return [builder.sub(one, every(1)) for one in sizes], sizes

    def ordered(builder: Any, words: list[Any]) -> list[Any]:
        """Turn the words of floats into integers of the same order; both zeros are 0."""
        signs = [builder.ashr(one, every(bits - 1)) for one in words]
        return [
            builder.sub(builder.xor(builder.and_(one, every(most)), sign), sign)
            for one, sign in zip(words, signs, strict=True)
        ]

    @intrinsic
    def centre(typingctx, pointers, offset, rows, sources, based, slots, word):
        """Write a strip of the first source, and of the differences of the others from it.

        `pointers` is the address of a table of `sources` sources, `offset` in bytes, `slots` where their digest sums
        are, `word` the number in the block of the strip's first. Returns how many elements vary, moved, and conflict,
        and in how many a difference may need more than float32.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointers, offset, rows, sources, based, slots, word = arguments
            counts = [cgutils.alloca_once_value(builder, every(0)) for _ in range(4)]
            bounds, sizes = _Bounds(builder, kind, signed=True), _Bounds(builder, kind, signed=False)
            has_base = builder.icmp_signed("!=", based, ir.Constant(I64, 0))

            def times(number: Any, nbytes: int) -> Any:
                return builder.mul(number, ir.Constant(I64, nbytes))

            def count(flags: tuple[Any, ...], places: list[Any]) -> None:
                for flag, place in zip(flags, places, strict=True):
                    builder.store(builder.sub(builder.load(place), builder.sext(flag, kind)), place)

            with cgutils.for_range(builder, ir.Constant(I64, ROW * itemsize // _LINE)) as line:
                inside = builder.add(offset, times(line.index, _LINE))
                home = builder.add(rows, times(line.index, value_bytes * _LINE // itemsize))
                numbers = counters(builder, builder.add(word, times(line.index, _LINE // 8)), 2)

                def take(number: Any) -> tuple[list[Any], list[Any]]:
                    address = builder.add(load(builder, builder.add(pointers, times(number, 8)), I64), inside)
                    absorb(builder, address, numbers, builder.add(slots, times(number, SLOT)))
                    words = [load(builder, plus(builder, address, 32 * half), kind) for half in range(2)]
                    return words, [value for one in words for value in read(builder, one)]

                words, values = take(ir.Constant(I64, 0))
                firsts = ordered(builder, words)
                sizes.begin(*sized(builder, words))
                bounds.begin(*([builder.select(has_base, every(n), one) for one in firsts] for n in (most, -1 - most)))
                for n, value in enumerate(values):
                    store(builder, value, plus(builder, home, 32 * n))
                with cgutils.for_range(builder, builder.sub(sources, ir.Constant(I64, 1))) as row:
                    number = builder.add(row.index, ir.Constant(I64, 1))
                    words, values = take(number)
                    bounds.take(*[ordered(builder, words)] * 2)
                    if near:
                        sizes.take(*sized(builder, words))
                    there = builder.add(home, times(number, value_bytes * ROW))
                    for n, value in enumerate(values):
                        middle = load(builder, plus(builder, home, 32 * n), values_kind)
                        store(builder, builder.fsub(value, middle), plus(builder, there, 32 * n))
                for (low, high), first in zip(bounds.pairs(), firsts, strict=True):
                    below, above = builder.icmp_signed("<", low, first), builder.icmp_signed(">", high, first)
                    varies = builder.icmp_signed("<", low, high)
                    count((varies, builder.or_(below, above), builder.and_(below, above)), counts[:3])
                for low, high in sizes.pairs() if near else ():
                    wide = builder.icmp_signed(">", builder.sub(high, low), every(gap + 1))
                    wide = builder.and_(wide, builder.icmp_unsigned(">", high, low))
                    count((builder.or_(wide, builder.icmp_signed(">=", high, every(top))),), counts[3:])
            totals = []
            for place in counts:
                lanes, total = builder.load(place), ir.Constant(I64, 0)
                for lane in range(many):
                    found = builder.extract_element(lanes, ir.Constant(I32, lane))
                    total = builder.add(total, found if bits == 64 else builder.zext(found, I64))
                totals.append(total)
            return context.make_tuple(builder, signature.return_type, totals)

        i, u = types.int64, types.uint64
        return types.UniTuple(i, 4)(u, i, u, i, i, u, i), generate

    return centre


# How far the magnitudes of an element may lie apart, in 16-bit patterns, so that 24 bits hold its differences: those of
# the larger and their distance, since what lies so far below it does not carry. And the first that is too large.
_GAPS = {BF16: (16 << 7, 254 << 7), F16: (13 << 10, 31 << 10)}

_near_bf16, _near_f16 = _centrer(2, _bf16_as_f32, _GAPS[BF16]), _centrer(2, _f16_as_f32, _GAPS[F16])
_any_bf16, _any_f16 = _centrer(2, _bf16), _centrer(2, _f16)
_any_f32, _any_f64 = _centrer(4, _f32), _centrer(8, _f64)


@numba.njit(nogil=True)
def centre(code, pointers, offset, rows, sources, based, slots, word):
    """Do what `_centrer` says, for sources of one dtype; those of 16 bits as float32."""
    if code == BF16:
        return _near_bf16(pointers, offset, rows, sources, based, slots, word)
    if code == F16:
        return _near_f16(pointers, offset, rows, sources, based, slots, word)
    if code == F32:
        return _any_f32(pointers, offset, rows, sources, based, slots, word)
    return _any_f64(pointers, offset, rows, sources, based, slots, word)


@numba.njit(nogil=True)
def centre_again(code, pointers, offset, rows, sources, based, slots, word):
    """Do it again as float64, for sources of 16 bits whose differences float32 may not hold."""
    if code == BF16:
        return _any_bf16(pointers, offset, rows, sources, based, slots, word)
    return _any_f16(pointers, offset, rows, sources, based, slots, word)
