"""Divide the accumulator and round it once, straight from float64 to the output's dtype, as LLVM vector loops.

A cast float64 → float32 → 16 bits rounds twice. Here the value is first rounded in float64 itself, by adding and
subtracting a constant so large that the sum keeps exactly the output's mantissa; then every cast is exact.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .given import DIVIDE, MULTIPLY
from .halves import halves_from_singles
from .vectors import F32, F64, I16, I32, I64, constant, load, splat, store, vector

__all__ = ["finish_bf16", "finish_f16", "finish_f32", "finish_f64"]

LANES = 8
_MAGNITUDE, _EXPONENT = 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000


def _divided(builder: Any, a: Any, divisor: Any, reciprocal: Any, mode: int) -> Any:
    if mode == MULTIPLY:
        return builder.fmul(a, reciprocal)
    return builder.fdiv(a, divisor)


def to_grid(builder: Any, q: Any, mantissa: int, smallest: float) -> Any:
    """Round a float64 vector to `mantissa` stored bits, with subnormals below the normal number `smallest`.

    Adding 1.5 * 2**(52 - mantissa) times the value's power of two leaves exactly the wanted bits, rounded to
    nearest even by the addition. The power is held above `smallest`, which gives the fixed grid of the
    subnormals, and below 2**200, so that the sum cannot overflow. The sign of a zero is put back at the end.
    """
    count = q.type.count
    ints = vector(I64, count)
    bits = builder.bitcast(q, ints)
    power = builder.bitcast(builder.and_(bits, constant(I64, count, _EXPONENT)), q.type)
    least, most = constant(F64, count, smallest), constant(F64, count, 2.0**200)
    power = builder.select(builder.fcmp_ordered(">", power, least), power, least)
    power = builder.select(builder.fcmp_ordered("<", power, most), power, most)
    large = builder.fmul(power, constant(F64, count, 1.5 * 2.0 ** (52 - mantissa)))
    rounded = builder.fsub(builder.fadd(q, large), large)
    sign = builder.and_(bits, constant(I64, count, _MAGNITUDE + 1))
    return builder.bitcast(builder.or_(builder.bitcast(rounded, ints), sign), q.type)


def _finisher(itemsize: int, encode: Any) -> Any:
    @intrinsic
    def finish(typingctx, acc, count, out, divisor, reciprocal, mode):
        """Store acc / divisor, rounded, and return how many output lanes showed a non-finite value (0 or not)."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            acc, count, out, divisor, reciprocal, mode = arguments
            found = cgutils.alloca_once_value(builder, ir.Constant(I64, 0))

            def body(begin: Any, steps: Any, width: int, chosen: int) -> None:
                lanes = vector(I64 if itemsize == 8 else I32, width)
                flags = cgutils.alloca_once(builder, lanes)
                builder.store(constant(lanes.element, width, 0), flags)
                by, inverse = splat(builder, divisor, width), splat(builder, reciprocal, width)
                with cgutils.for_range(builder, steps) as step:
                    at = builder.add(begin, builder.mul(step.index, ir.Constant(I64, width)))
                    value = load(builder, builder.add(acc, builder.mul(at, ir.Constant(I64, 8))), vector(F64, width))
                    q = _divided(builder, value, by, inverse, chosen)
                    item, bad = encode(builder, q)
                    builder.store(builder.or_(builder.load(flags), builder.sext(bad, lanes)), flags)
                    store(builder, item, builder.add(out, builder.mul(at, ir.Constant(I64, itemsize))))
                for lane in range(width):
                    flag = builder.extract_element(builder.load(flags), ir.Constant(I32, lane))
                    word = flag if itemsize == 8 else builder.zext(flag, I64)
                    builder.store(builder.or_(builder.load(found), word), found)

            whole = builder.sdiv(count, ir.Constant(I64, LANES))
            done = builder.mul(whole, ir.Constant(I64, LANES))
            rest = builder.sub(count, done)
            for chosen in (MULTIPLY, DIVIDE):
                with builder.if_then(builder.icmp_signed("==", mode, ir.Constant(I64, chosen))):
                    body(ir.Constant(I64, 0), whole, LANES, chosen)
                    body(done, rest, 1, chosen)
            return builder.load(found)

        i, u, f = types.int64, types.uint64, types.float64
        return i(u, i, u, f, f, i), generate

    return finish


def _beyond(builder: Any, single: Any, limit: float) -> Any:
    """Tell, lane by lane, whether |single| is at least `limit`, or NaN."""
    count, kind = single.type.count, single.type
    bits = vector(I32 if kind.element == F32 else I64, count)
    mask = constant(bits.element, count, (1 << (bits.element.width - 1)) - 1)
    size = builder.bitcast(builder.and_(builder.bitcast(single, bits), mask), kind)
    return builder.fcmp_unordered(">=", size, constant(kind.element, count, limit))


def _bf16(builder: Any, q: Any) -> tuple[Any, Any]:
    count = q.type.count
    single = builder.fptrunc(to_grid(builder, q, 7, 2.0**-126), vector(F32, count))
    bits = builder.lshr(builder.bitcast(single, vector(I32, count)), constant(I32, count, 16))
    return builder.trunc(bits, vector(I16, count)), _beyond(builder, single, float("inf"))


def _f16(builder: Any, q: Any) -> tuple[Any, Any]:
    count = q.type.count
    single = builder.fptrunc(to_grid(builder, q, 10, 2.0**-14), vector(F32, count))
    return halves_from_singles(builder, single), _beyond(builder, single, 65536.0)


def _f32(builder: Any, q: Any) -> tuple[Any, Any]:
    single = builder.fptrunc(q, vector(F32, q.type.count))
    return single, _beyond(builder, single, float("inf"))


def _f64(builder: Any, q: Any) -> tuple[Any, Any]:
    return q, _beyond(builder, q, float("inf"))


finish_bf16 = _finisher(2, _bf16)
finish_f16 = _finisher(2, _f16)
finish_f32 = _finisher(4, _f32)
finish_f64 = _finisher(8, _f64)
