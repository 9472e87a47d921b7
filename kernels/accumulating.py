"""Add sources to float64 or float32 accumulators, one vector loop for each dtype, as LLVM IR.

The accumulators of 32 elements stay in registers over a group of sources: float32 is summed at 46 GB/s, float16 and
bfloat16 at 14-15 (Zen 3, one core, data in L1): there the conversions to float64, four a cycle, set the pace. Loops
without the multiplication, for weights of 1, were 6 % faster for float32 and nothing from mapped files; plain means of
16-bit sources go another way (`exact_means`). Additions keep their order element by element: a vector holds
different elements, never partial sums.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .digest_vectors import absorb, counters
from .given import SLOT
from .halves import singles_from_halves
from .vectors import F32, F64, I16, I32, I64, constant, load, part, plus, splat, store, vector

__all__ = ["TO_F32", "TO_F64"]

LANES = 32
"""Elements a step: eight AVX2 registers of accumulators, the most that leave room to work."""


def _bf16(builder: Any, address: Any, count: int) -> Any:
    """Turn bfloat16 into float32 by putting zeros below each: vpunpcklwd and vpunpckhwd.

    Shifts and masks, which give the even and the odd elements, are 5 % faster for 32 sources and, as the halves
    must be woven together at the end, 12 % slower for 8.
    """
    half = load(builder, address, vector(I16, count))
    order = [lane for element in range(count) for lane in (0, count + element)]
    wide = builder.shuffle_vector(constant(I16, count, 0), half, ir.Constant(vector(I32, 2 * count), order))
    return builder.bitcast(wide, vector(F32, count))


def _f16(builder: Any, address: Any, count: int) -> Any:
    return singles_from_halves(builder, load(builder, address, vector(I16, count)))


def _f32(builder: Any, address: Any, count: int) -> Any:
    return load(builder, address, vector(F32, count))


def _f64(builder: Any, address: Any, count: int) -> Any:
    return load(builder, address, vector(F64, count))


def _as(builder: Any, value: Any, real: Any) -> Any:
    """Turn float32 into float64 or back, lane by lane, if it is not that already."""
    kind = vector(real, value.type.count)
    if value.type == kind:
        return value
    return builder.fpext(value, kind) if real == F64 else builder.fptrunc(value, kind)


def _adder(itemsize: int, read: Any, real: Any) -> Any:
    size = 8 if real == F64 else 4
    widest = 32 // size

    def values(builder: Any, address: Any, lanes: int) -> list[Any]:
        """Return consecutive elements as vectors of at most 32 bytes, of the accumulators' type."""
        count = min(lanes, 8)
        found = []
        for first in range(0, lanes, count):
            read_ones = read(builder, plus(builder, address, first * itemsize), count)
            for at in range(0, count, min(count, widest)):
                found.append(_as(builder, part(builder, read_ones, at, min(count, widest)), real))
        return found

    @intrinsic
    def add(typingctx, pointers, weights, sources, offset, count, acc, fresh, slots, word):
        """Add weights[k] * source[k] to the accumulators for every k, in that order.

        `pointers` and `weights` are the addresses of tables of `sources` entries; `offset` is in bytes, into
        every source; `count` are elements; `acc` is the address of the accumulators, `fresh` whether they start
        at -0.0 (which adds nothing to any number, itself included) rather than at what they hold. `slots`, where
        not zero, is the address of the sources' digest sums; they are added to for whole steps, the first of
        which begins with word `word` of the block.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointers, weights, sources, offset, count, acc, fresh, slots, word = arguments
            restart = builder.icmp_signed("!=", fresh, ir.Constant(I64, 0))
            eight, bytes_each = ir.Constant(I64, 8), ir.Constant(I64, size)
            hashing = builder.icmp_signed("!=", slots, ir.Constant(I64, 0))

            def step(at: Any, lanes: int) -> None:
                kind = vector(real, min(lanes, widest))
                home = builder.add(acc, builder.mul(at, bytes_each))
                inside = builder.add(offset, builder.mul(at, ir.Constant(I64, itemsize)))
                sums = [cgutils.alloca_once(builder, kind) for _ in range(lanes // kind.count)]
                for number, one in enumerate(sums):
                    held = load(builder, plus(builder, home, 32 * number), kind)
                    builder.store(builder.select(restart, constant(real, kind.count, -0.0), held), one)
                at_word = builder.add(word, builder.udiv(builder.mul(at, ir.Constant(I64, itemsize)), eight))
                numbers = counters(builder, at_word, LANES * itemsize // 32)
                with cgutils.for_range(builder, sources) as source:
                    entry = builder.mul(source.index, eight)
                    base = builder.add(load(builder, builder.add(pointers, entry), I64), inside)
                    if lanes == LANES:
                        with builder.if_then(hashing):
                            slot = builder.add(slots, builder.mul(source.index, ir.Constant(I64, SLOT)))
                            absorb(builder, base, numbers, slot)
                    terms = values(builder, base, lanes)
                    factor = _as(builder, load(builder, builder.add(weights, entry), vector(F64, 1)), real)
                    weight = splat(builder, builder.extract_element(factor, ir.Constant(I32, 0)), kind.count)
                    for one, term in zip(sums, terms, strict=True):
                        builder.store(builder.fadd(builder.load(one), builder.fmul(weight, term)), one)
                for number, one in enumerate(sums):
                    store(builder, builder.load(one), plus(builder, home, 32 * number))

            def steps(begin: Any, number: Any, lanes: int) -> None:
                with cgutils.for_range(builder, number) as loop:
                    step(builder.add(begin, builder.mul(loop.index, ir.Constant(I64, lanes))), lanes)

            whole = builder.sdiv(count, ir.Constant(I64, LANES))
            done = builder.mul(whole, ir.Constant(I64, LANES))
            steps(ir.Constant(I64, 0), whole, LANES)
            steps(done, builder.sub(count, done), 1)
            return context.get_dummy_value()

        i, u = types.int64, types.uint64
        return types.void(u, u, i, i, i, u, i, u, i), generate

    return add


_READS = ((2, _bf16), (2, _f16), (4, _f32), (8, _f64))

TO_F64 = tuple(_adder(itemsize, read, F64) for itemsize, read in _READS)
"""For sources of bfloat16, float16, float32 and float64, in that order."""

TO_F32 = tuple(_adder(itemsize, read, F32) for itemsize, read in _READS)
"""As TO_F64, to float32 accumulators: weights and products are rounded to float32, too."""
