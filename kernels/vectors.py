"""Vector loops written as LLVM IR: what numba's own loops did not become.

Each intrinsic is a loop over explicit vectors that LLVM splits into the registers of the machine, so speed does
not hang on whether the auto-vectoriser can prove that many addresses do not overlap: the digest ran at 34 GB/s
as a numba loop and at 60 here (Zen 3, one core, data in L1). `accumulate` keeps its sums in registers over all
sources of a group: float32 at 50 GB/s for 2 sources as for 32. 16-bit sources become float32 in L1 first, so
that one loop serves all narrow dtypes, mixed ones too; widening in registers, a loop a dtype, made the whole of
`combine` 3-8 % faster (bfloat16, 32 sources: 10.1 against 9.4 GB/s); dropping the multiplication from that
loop, for unit weights, took it from 14 to 17 GB/s. Additions keep their order element by element: a vector holds
different elements, never partial sums.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["accumulate_f32", "accumulate_f64", "digest_sums", "expand_bf16", "expand_f16"]

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()

LANES = 32
"""Elements a step of `accumulate`: eight AVX2 registers of accumulators, the most that leave room to work."""


def vector(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count)


def splat(builder: Any, value: Any, count: int) -> Any:
    """Repeat a scalar in every lane."""
    one = builder.insert_element(ir.Constant(vector(value.type, count), ir.Undefined), value, ir.Constant(I32, 0))
    undefined = ir.Constant(vector(value.type, count), ir.Undefined)
    return builder.shuffle_vector(one, undefined, ir.Constant(vector(I32, count), [0] * count))


def constant(kind: Any, count: int, value: Any) -> Any:
    return ir.Constant(vector(kind, count), [value] * count)


def load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _bf16(builder: Any, address: Any, count: int) -> Any:
    """Turn bfloat16 into float32 by putting zeros below each: one shuffle (vpunpcklwd) for eight elements."""
    half = load(builder, address, vector(I16, count))
    order = [lane for element in range(count) for lane in (0, count + element)]
    wide = builder.shuffle_vector(constant(I16, count, 0), half, ir.Constant(vector(I32, 2 * count), order))
    return builder.bitcast(wide, vector(F32, count))


def _f16(builder: Any, address: Any, count: int) -> Any:
    return builder.fpext(load(builder, address, vector(ir.HalfType(), count)), vector(F32, count))


def _expander(single: Any) -> Any:
    @intrinsic
    def expand(typingctx, source, count, stage):
        """Write `count` 16-bit elements at `source` as float32 at `stage`: exact."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, count, stage = arguments

            def body(begin: Any, steps: Any, width: int) -> None:
                with cgutils.for_range(builder, steps) as step:
                    at = builder.add(begin, builder.mul(step.index, ir.Constant(I64, width)))
                    here = builder.add(source, builder.mul(at, ir.Constant(I64, 2)))
                    there = builder.add(stage, builder.mul(at, ir.Constant(I64, 4)))
                    store(builder, single(builder, here, width), there)

            whole = builder.sdiv(count, ir.Constant(I64, 16))
            done = builder.mul(whole, ir.Constant(I64, 16))
            body(ir.Constant(I64, 0), whole, 16)
            body(done, builder.sub(count, done), 1)
            return context.get_dummy_value()

        return types.void(types.uint64, types.int64, types.uint64), generate

    return expand


def _accumulator(held_as: Any) -> Any:
    @intrinsic
    def accumulate(typingctx, pointers, first, last, weights, offset, count, acc, fresh):
        """Add weights[k] * source[k] to the accumulator for first <= k < last, in that order.

        `pointers` and `weights` are addresses of tables, `offset` bytes into every source, `count` elements,
        `acc` the address of float64 accumulators, `fresh` whether they start at -0.0 (which adds nothing to
        any number, itself included) rather than at what they hold.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointers, first, last, weights, offset, count, acc, fresh = arguments
            itemsize = 4 if held_as is F32 else 8
            eight, sources = ir.Constant(I64, 8), builder.sub(last, first)
            restart = builder.icmp_signed("!=", fresh, ir.Constant(I64, 0))

            def body(begin: Any, steps: Any, parts: int, width: int) -> None:
                kind, lanes = vector(F64, width), parts * width
                sums = [cgutils.alloca_once(builder, kind) for _ in range(parts)]
                with cgutils.for_range(builder, steps) as step:
                    at = builder.add(begin, builder.mul(step.index, ir.Constant(I64, lanes)))
                    home = builder.add(acc, builder.mul(at, eight))
                    inside = builder.add(offset, builder.mul(at, ir.Constant(I64, itemsize)))
                    for part, one in enumerate(sums):
                        held = load(builder, builder.add(home, ir.Constant(I64, 8 * width * part)), kind)
                        builder.store(builder.select(restart, constant(F64, width, -0.0), held), one)
                    with cgutils.for_range(builder, sources) as source:
                        entry = builder.mul(builder.add(first, source.index), eight)
                        base = builder.add(load(builder, builder.add(pointers, entry), I64), inside)
                        weight = splat(builder, load(builder, builder.add(weights, entry), F64), width)
                        for part, one in enumerate(sums):
                            where = builder.add(base, ir.Constant(I64, itemsize * width * part))
                            value = load(builder, where, vector(held_as, width))
                            wide = value if value.type == kind else builder.fpext(value, kind)
                            builder.store(builder.fadd(builder.load(one), builder.fmul(weight, wide)), one)
                    for part, one in enumerate(sums):
                        store(builder, builder.load(one), builder.add(home, ir.Constant(I64, 8 * width * part)))

            whole = builder.sdiv(count, ir.Constant(I64, LANES))
            done = builder.mul(whole, ir.Constant(I64, LANES))
            body(ir.Constant(I64, 0), whole, LANES // 4, 4)
            body(done, builder.sub(count, done), 1, 1)
            return context.get_dummy_value()

        i, u = types.int64, types.uint64
        return types.void(u, i, i, u, i, i, u, i), generate

    return accumulate


expand_bf16 = _expander(_bf16)
expand_f16 = _expander(_f16)
accumulate_f32 = _accumulator(F32)
accumulate_f64 = _accumulator(F64)

_STEP = 0x9E3779B97F4A7C15
_WORDS = 16
_M64 = (1 << 64) - 1


@intrinsic
def digest_sums(typingctx, address, words):
    """Return the two sums (s1, s2) of `block_digest` over the first `words` // 16 * 16 whole words."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, words = arguments
        kind, parts = vector(I64, 4), _WORDS // 4
        steps = builder.udiv(words, ir.Constant(I64, _WORDS))
        sums = [[cgutils.alloca_once(builder, kind) for _ in range(parts)] for _ in range(2)]
        counters = [cgutils.alloca_once(builder, kind) for _ in range(parts)]
        for part in range(parts):
            for one in sums:
                builder.store(constant(I64, 4, 0), one[part])
            start = [(4 * part + lane + 1) * _STEP & _M64 for lane in range(4)]
            builder.store(ir.Constant(kind, start), counters[part])
        low, shift = constant(I64, 4, 0xFFFFFFFF), constant(I64, 4, 32)
        advance = constant(I64, 4, _WORDS * _STEP & _M64)
        with cgutils.for_range(builder, steps) as step:
            here = builder.add(address, builder.mul(step.index, ir.Constant(I64, 8 * _WORDS)))
            for part in range(parts):
                word = load(builder, builder.add(here, ir.Constant(I64, 32 * part)), kind)
                counter = builder.load(counters[part])
                a = builder.add(word, counter)
                product = builder.mul(builder.and_(a, low), builder.lshr(a, shift))
                for one, value in zip(sums, (product, word), strict=True):
                    builder.store(builder.add(builder.load(one[part]), value), one[part])
                builder.store(builder.add(counter, advance), counters[part])
        totals = []
        for one in sums:
            lanes = builder.load(one[0])
            for part in range(1, parts):
                lanes = builder.add(lanes, builder.load(one[part]))
            total = ir.Constant(I64, 0)
            for lane in range(4):
                total = builder.add(total, builder.extract_element(lanes, ir.Constant(I32, lane)))
            totals.append(total)
        return context.make_tuple(builder, signature.return_type, totals)

    return types.UniTuple(types.uint64, 2)(types.uint64, types.int64), generate
