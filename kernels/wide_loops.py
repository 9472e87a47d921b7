"""The loops of `combine_wide` over a strip of elements, as LLVM IR: sums of pairs, and their quotients.

A strip's state is five rows of STRIP numbers: high and low halves of the sums, plain float64 sums, the largest
magnitudes (as bits, so that NaN is the largest of all), and scales.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .pairs import Pair, add_pairs, divide_pairs, quick_two_sum, round_scaled, scale_of, split, times, to_odd
from .vector_numbers import Numbers, choose
from .vectors import F64, I64, constant, load, part, plus, store, vector

__all__ = ["AS_F64", "AS_ODD", "AS_PAIR", "LANES", "STRIP", "add_wide", "quotients"]

LANES = 16
"""Elements a step: four chains of dependent operations, against two a quarter faster for weights of 1."""

STRIP = 256
"""Elements of a strip: its state and a group of sources, 2 KiB each, lie in L1."""

AS_F64, AS_ODD, AS_PAIR = 0, 1, 2
"""What `quotients` writes: float64; float64 rounded to odd, to be rounded again; both halves."""

_ROW = 8 * STRIP
_INFINITY = 0x7FF0000000000000


def _rows(builder: Any, state: Any, at: Any) -> list[Any]:
    """Return the addresses of the state's five rows at element `at`."""
    home = builder.add(state, builder.mul(at, ir.Constant(I64, 8)))
    return [plus(builder, home, _ROW * row) for row in range(5)]


def _load(builder: Any, address: Any) -> Numbers:
    return Numbers(builder, load(builder, address, vector(F64, LANES)))


class _Sums:
    """What is summed for one step: a pair, a plain sum and the largest magnitude."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.kept = [cgutils.alloca_once(builder, vector(F64, LANES)) for _ in range(4)]

    def _get(self) -> list[Numbers]:
        return [Numbers(self.builder, self.builder.load(one)) for one in self.kept]

    def _put(self, values: list[Numbers]) -> None:
        for one, number in zip(self.kept, values, strict=True):
            self.builder.store(number.value, one)

    def load(self, rows: list[Any]) -> None:
        self._put([_load(self.builder, row) for row in rows[:4]])

    def save(self, rows: list[Any]) -> None:
        for row, number in zip(rows[:4], self._get(), strict=True):
            store(self.builder, number.value, row)

    def start(self, x: Numbers, term: Pair, plain: Numbers) -> None:
        self._put([*term, plain, x.size()])

    def add(self, x: Numbers, term: Pair, plain: Numbers) -> None:
        high, low, total, most = self._get()
        size = x.size()
        larger = self.builder.icmp_signed(">", size.bits(), most.bits())
        self._put([*add_pairs((high, low), term), total + plain, choose(larger, size, most)])


@intrinsic
def add_wide(typingctx, places, weights, sources, plain, steps, state, fresh):
    """Add weights[k] * source[k] for every k, in that order, to `steps` times LANES elements of the state.

    `places` and `weights` are the addresses of tables of `sources` entries; the sources are float64. `plain` tells
    that all weights and scales are 1, which saves the products; `fresh` that the state holds nothing yet but scales.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places, weights, sources, plain, steps, state, fresh = arguments
        zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
        begins = builder.icmp_signed("!=", fresh, zero)

        def addends(source: Any, at: Any, rows: list[Any], products: bool) -> tuple[Numbers, Pair, Numbers]:
            entry = builder.mul(source, ir.Constant(I64, 8))
            base = load(builder, builder.add(places, entry), I64)
            x = _load(builder, builder.add(base, builder.mul(at, ir.Constant(I64, 8))))
            if not products:
                return x, (x, x.filled(0.0)), x
            weight = Numbers(builder, load(builder, builder.add(weights, entry), F64))
            high, low = (half.spread(LANES) for half in split(weight))
            w = weight.spread(LANES)
            return x, times(x * _load(builder, rows[4]), w, (high, low)), x * w

        def loop(products: bool) -> None:
            sums = _Sums(builder)
            with cgutils.for_range(builder, steps) as step:
                at = builder.mul(step.index, ir.Constant(I64, LANES))
                rows = _rows(builder, state, at)
                with builder.if_else(begins) as (first, later):
                    with first:
                        sums.start(*addends(zero, at, rows, products))
                    with later:
                        sums.load(rows)
                with cgutils.for_range(builder, sources, start=builder.select(begins, one, zero)) as source:
                    sums.add(*addends(source.index, at, rows, products))
                sums.save(rows)

        with builder.if_else(builder.icmp_signed("!=", plain, zero)) as (without, with_products):
            with without:
                loop(False)
            with with_products:
                loop(True)
        return context.get_dummy_value()

    i, u = types.int64, types.uint64
    return types.void(u, u, i, i, i, u, i), generate


def _any(builder: Any, flags: Any) -> Any:
    bits = ir.IntType(flags.type.count)
    return builder.zext(builder.icmp_unsigned("!=", builder.bitcast(flags, bits), ir.Constant(bits, 0)), I64)


def _all(builder: Any, flags: Any) -> Any:
    bits = ir.IntType(flags.type.count)
    return builder.icmp_unsigned("==", builder.bitcast(flags, bits), ir.Constant(bits, (1 << flags.type.count) - 1))


def _divides_exactly(builder: Any, sums: Pair) -> Any:
    """Tell where dividing both halves by a power of two up to 2**64 is exact, and all that a division would do.

    They are not tiny, or zero, and the low half is one.
    """
    found = sums[1].size().compare("<=", sums[0].size() * 2.0**-52)
    for half, least in zip(sums, (2.0**-800, 2.0**-900), strict=True):
        enough = builder.or_(half.size().compare(">=", least), half.compare("==", 0.0))
        found = builder.and_(found, enough)
    return found


def _unsuited(builder: Any, most: Numbers) -> Any:
    """Tell which elements cannot do with a scale of 1: too large, not finite, or too small (but not zero)."""
    large = builder.fcmp_unordered(">", most.value, constant(F64, LANES, 2.0**500))
    small = builder.and_(most.compare("<", 2.0**-500), most.compare("!=", 0.0))
    return builder.or_(large, small)


def _interleaved(builder: Any, a: Numbers, b: Numbers) -> Any:
    order = [lane for element in range(LANES) for lane in (element, LANES + element)]
    return builder.shuffle_vector(a.value, b.value, ir.Constant(vector(ir.IntType(32), 2 * LANES), order))


@intrinsic
def quotients(typingctx, state, steps, divisor, divisor_low, inverse, kind, out, trial):
    """Divide the sums of `steps` times LANES elements and write what `kind` says to `out`.

    `inverse` is 1 / divisor where that is exact and the divisor's low half is 0, else 0. Returns 2 if a result is
    not finite; with `trial`, scales are taken as 1, the right ones are written to the state, and 1 is added if they
    differ where that matters: then the results are void.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        state, steps, divisor, divisor_low, inverse, kind, out, trial = arguments
        flags = cgutils.alloca_once_value(builder, ir.Constant(I64, 0))
        by, by_low, reciprocal = (Numbers(builder, d).spread(LANES) for d in (divisor, divisor_low, inverse))
        by_high, by_rest = (half.spread(LANES) for half in split(Numbers(builder, divisor)))
        simple = builder.fcmp_ordered("!=", inverse, ir.Constant(F64, 0.0))
        trying = builder.icmp_signed("!=", trial, ir.Constant(I64, 0))

        def note(lanes: Any, value: int) -> None:
            flag = builder.mul(_any(builder, lanes), ir.Constant(I64, value))
            builder.store(builder.or_(builder.load(flags), flag), flags)

        def by_scaling(sums: Pair) -> Pair:
            high, low = quick_two_sum(sums[0] * reciprocal, sums[1] * reciprocal)
            # `divide_pairs` never leaves a negative zero here.
            return high, low + 0.0

        def divided(sums: Pair) -> Pair:
            found = [cgutils.alloca_once(builder, by.value.type) for _ in range(2)]
            with builder.if_else(builder.and_(simple, _all(builder, _divides_exactly(builder, sums)))) as branches:
                for branch, exact in zip(branches, (True, False), strict=True):
                    with branch:
                        q = by_scaling(sums) if exact else divide_pairs(sums, (by, by_low), (by_high, by_rest))
                        for one, half in zip(found, q, strict=True):
                            builder.store(half.value, one)
            high, low = (Numbers(builder, builder.load(one)) for one in found)
            return high, low

        def write(at: Any, q: Pair, scale: Numbers) -> None:
            inverse, value = (cgutils.alloca_once(builder, by.value.type) for _ in range(2))
            with builder.if_else(trying) as (unscaled, scaled):
                with unscaled:
                    builder.store(scale.filled(1.0).value, inverse)
                    builder.store(q[0].value, value)
                with scaled:
                    over = scale.filled(1.0) / scale
                    builder.store(over.value, inverse)
                    builder.store(round_scaled(*q, scale, over).value, value)
            factor = Numbers(builder, builder.load(inverse))
            with builder.if_else(builder.icmp_signed("==", kind, ir.Constant(I64, AS_PAIR))) as (pair, single):
                with pair:
                    high = q[0] * factor
                    low = choose(high.is_finite(), q[1] * factor, high.filled(0.0))
                    both = _interleaved(builder, high, low)
                    twice = builder.add(out, builder.mul(at, ir.Constant(I64, 16)))
                    for half in range(2):
                        store(builder, part(builder, both, LANES * half, LANES), plus(builder, twice, 8 * LANES * half))
                    builder.store(high.value, value)
                with single:
                    with builder.if_then(builder.icmp_signed("==", kind, ir.Constant(I64, AS_ODD))):
                        builder.store((to_odd(*q) * factor).value, value)
                    where = builder.add(out, builder.mul(at, ir.Constant(I64, 8)))
                    store(builder, builder.load(value), where)
            note(builder.not_(Numbers(builder, builder.load(value)).is_finite()), 2)

        with cgutils.for_range(builder, steps) as step:
            at = builder.mul(step.index, ir.Constant(I64, LANES))
            rows = _rows(builder, state, at)
            high, low, plain, most, scale = (_load(builder, row) for row in rows)
            one = scale.filled(1.0)
            scale = Numbers(builder, builder.select(trying, one.value, scale.value))
            with builder.if_then(trying):
                note(_unsuited(builder, most), 1)
                store(builder, scale_of(most).value, rows[4])
            q, q_low = divided((high, low))
            zero = high.compare("==", 0.0)
            marked = builder.icmp_unsigned(">=", most.bits(), constant(I64, LANES, _INFINITY))
            nothing = plain.filled(0.0)
            q = choose(zero, choose(plain.compare("==", 0.0), plain, nothing) / by, q)
            q = choose(marked, plain / by, q)
            either = builder.or_(zero, marked)
            write(at, (q, choose(either, nothing, q_low)), choose(either, one, scale))
        return builder.load(flags)

    i, u, f = types.int64, types.uint64, types.float64
    return i(u, i, f, f, f, i, u, i), generate
