"""Convert float16 to float32 and back, as parts of LLVM loops.

Where the target has instructions for it, they are taken. Elsewhere (x86 without F16C) LLVM calls functions of a library
that is not there when code is compiled in memory, and ends the process; so integers and floats do it, bit for bit the
same. With these alone, means of 2 and of 8 sources from memory took 1.7 to 2.1 times as long as with the instructions
(Zen 5, one core). Sources: Giesen, "half_to_float_fast4" and "float_to_half_fast3_rtne" (2012); payloads of NaNs: own.
"""

from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core.registry import cpu_target

from .vectors import F32, I16, I32, vector

__all__ = ["halves_from_singles", "singles_from_halves"]

_PROBE = """
define <8 x float> @up(<8 x half> %x) { %y = fpext <8 x half> %x to <8 x float> ret <8 x float> %y }
define <8 x half> @down(<8 x float> %x) { %y = fptrunc <8 x float> %x to <8 x half> ret <8 x half> %y }
"""
_CALLED = ("extendhf", "truncsfhf", "h2f", "f2h")  # what LLVM names such functions

_MAGNITUDE, _INFINITY, _QUIET = 0x7FFFFFFF, 0x7F800000, 0x400000
_BIAS = (127 - 15) << 23
_LEAST, _BEYOND = 113 << 23, 143 << 23  # 2**-14, the least normal half, and 2**16, as float32


@cache
def _has_instructions() -> bool:
    """Tell whether what numba compiles for converts halves without calling a function."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    text = machine.emit_assembly(llvm.parse_assembly(_PROBE))
    return not any(name in text for name in _CALLED)


def singles_from_halves(builder: Any, halves: Any) -> Any:
    """Turn 16-bit integers that are float16, one or a vector, into float32; NaNs become quiet."""
    if not _has_instructions():
        return _decoded(builder, halves)
    return builder.fpext(builder.bitcast(halves, _like(halves, ir.HalfType())), _like(halves, F32))


def halves_from_singles(builder: Any, singles: Any) -> Any:
    """Round float32, one or a vector, to nearest even float16, as 16-bit integers; NaNs become quiet."""
    if not _has_instructions():
        return _encoded(builder, singles)
    return builder.bitcast(builder.fptrunc(singles, _like(singles, ir.HalfType())), _like(singles, I16))


def _like(value: Any, kind: Any) -> Any:
    return vector(kind, value.type.count) if isinstance(value.type, ir.VectorType) else kind


def _every(kind: Any, value: Any) -> Any:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _decoded(builder: Any, halves: Any) -> Any:
    words, singles = _like(halves, I32), _like(halves, F32)
    wide = builder.zext(halves, words)
    size = builder.shl(builder.and_(wide, _every(words, 0x7FFF)), _every(words, 13))
    normal = builder.add(size, _every(words, _BIAS))
    # A subnormal gets the leading bit of 2**-14, which is then taken away as a number. No subnormal float32 comes up:
    # a processor may be set to take those as zero.
    with_bit = builder.bitcast(builder.add(normal, _every(words, 1 << 23)), singles)
    small = builder.bitcast(builder.fsub(with_bit, _every(singles, 2.0**-14)), words)
    special = builder.add(normal, _every(words, _BIAS))
    is_nan = builder.icmp_unsigned(">", special, _every(words, _INFINITY))
    special = builder.select(is_nan, builder.or_(special, _every(words, _QUIET)), special)
    bits = builder.select(builder.icmp_unsigned("<", size, _every(words, 1 << 23)), small, normal)
    bits = builder.select(builder.icmp_unsigned(">=", size, _every(words, 31 << 23)), special, bits)
    sign = builder.shl(builder.and_(wide, _every(words, 0x8000)), _every(words, 16))
    return builder.bitcast(builder.or_(bits, sign), singles)


def _encoded(builder: Any, singles: Any) -> Any:
    words = _like(singles, I32)
    word = builder.bitcast(singles, words)
    size = builder.and_(word, _every(words, _MAGNITUDE))
    # The last bit of 0.5 is that of the least subnormal half: adding it rounds to that.
    half = _every(singles.type, 0.5)
    small = builder.bitcast(builder.fadd(builder.bitcast(size, singles.type), half), words)
    small = builder.sub(small, builder.bitcast(half, words))
    # Just under half a unit, or half for an odd last bit; a carry may make an infinity, which is right.
    high = builder.lshr(size, _every(words, 13))
    nearly = builder.add(builder.and_(high, _every(words, 1)), _every(words, 0xFFF))
    normal = builder.lshr(builder.add(builder.sub(size, _every(words, _BIAS)), nearly), _every(words, 13))
    nan = builder.or_(builder.and_(high, _every(words, 0x3FF)), _every(words, 0x7E00))
    is_nan = builder.icmp_unsigned(">", size, _every(words, _INFINITY))
    special = builder.select(is_nan, nan, _every(words, 0x7C00))
    bits = builder.select(builder.icmp_unsigned("<", size, _every(words, _LEAST)), small, normal)
    bits = builder.select(builder.icmp_unsigned(">=", size, _every(words, _BEYOND)), special, bits)
    sign = builder.and_(builder.lshr(word, _every(words, 16)), _every(words, 0x8000))
    return builder.trunc(builder.or_(bits, sign), _like(singles, I16))
