"""Parts to build vector loops from, as LLVM IR, and the loop of the digest: what numba's own loops did not become.

Each intrinsic of this kind is a loop over explicit vectors that LLVM splits into the registers of the machine, so
speed does not hang on whether the auto-vectoriser can prove that many addresses do not overlap: the digest ran at
34 GB/s as a numba loop and at 60 here (Zen 3, one core, data in L1).
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["constant", "digest_sums", "load", "part", "plus", "prefetch", "splat", "store", "vector"]

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()


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


def part(builder: Any, whole: Any, first: int, count: int) -> Any:
    """Take `count` lanes of a vector from the one numbered `first`."""
    lanes = ir.Constant(vector(I32, count), list(range(first, first + count)))
    return builder.shuffle_vector(whole, whole, lanes)


def plus(builder: Any, address: Any, nbytes: int) -> Any:
    return builder.add(address, ir.Constant(I64, nbytes))


def prefetch(builder: Any, address: Any) -> None:
    """Ask for a cache line; an address beyond the mapped memory is no error."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    hint = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
    reading, into_l2, of_data = (ir.Constant(I32, flag) for flag in (0, 2, 1))
    builder.call(hint, [builder.inttoptr(address, I8.as_pointer()), reading, into_l2, of_data])


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
