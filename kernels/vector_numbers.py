"""float64 vectors with operators, so that a formula written once in Python becomes LLVM IR."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .vectors import F64, I64, constant, splat, vector

__all__ = ["Numbers", "choose"]

_EXPONENT, _MAGNITUDE = 0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF


def _bits_of(kind: Any) -> Any:
    return vector(I64, kind.count) if isinstance(kind, ir.VectorType) else I64


def _like(kind: Any, value: float | int) -> Any:
    return ir.Constant(kind, [value] * kind.count) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)


class Numbers:
    """A float64, or a vector of them, in code that is being built.

    Parameters
    ----------
    builder : IRBuilder
    value : Value
        An LLVM double or vector of doubles. Operators are single IEEE operations, never fused.
    """

    __slots__ = ("builder", "value")

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    def _made(self, value: Any) -> Numbers:
        return Numbers(self.builder, value)

    def _other(self, other: Numbers | float) -> Any:
        return other.value if isinstance(other, Numbers) else _like(self.value.type, other)

    def __add__(self, other: Numbers | float) -> Numbers:
        return self._made(self.builder.fadd(self.value, self._other(other)))

    def __sub__(self, other: Numbers | float) -> Numbers:
        return self._made(self.builder.fsub(self.value, self._other(other)))

    def __mul__(self, other: Numbers | float) -> Numbers:
        return self._made(self.builder.fmul(self.value, self._other(other)))

    def __truediv__(self, other: Numbers | float) -> Numbers:
        return self._made(self.builder.fdiv(self.value, self._other(other)))

    def __neg__(self) -> Numbers:
        return self._made(self.builder.fneg(self.value))

    def compare(self, relation: str, other: Numbers | float) -> Any:
        """Return a vector of booleans; false where either is NaN, except for "!="."""
        compared = self.builder.fcmp_unordered if relation == "!=" else self.builder.fcmp_ordered
        return compared(relation, self.value, self._other(other))

    def bits(self) -> Any:
        """Return the vector of 64-bit patterns."""
        return self.builder.bitcast(self.value, _bits_of(self.value.type))

    def from_bits(self, bits: Any) -> Numbers:
        """Return the numbers with these patterns."""
        return self._made(self.builder.bitcast(bits, self.value.type))

    def masked(self, mask: int) -> Numbers:
        """Return the numbers whose patterns are these ones' under `mask`."""
        return self.from_bits(self.builder.and_(self.bits(), _like(_bits_of(self.value.type), mask)))

    def size(self) -> Numbers:
        """Return the magnitudes."""
        return self.masked(_MAGNITUDE)

    def signed_as(self, other: Numbers) -> Numbers:
        """Return these magnitudes with the signs of `other`."""
        sign = other.masked(_MAGNITUDE + 1)
        return self.from_bits(self.builder.or_(self.size().bits(), sign.bits()))

    def is_finite(self) -> Any:
        """Tell, lane by lane, whether a number is neither NaN nor infinite."""
        exponent = self.masked(_EXPONENT).bits()
        return self.builder.icmp_unsigned("!=", exponent, _like(exponent.type, _EXPONENT))

    def spread(self, count: int) -> Numbers:
        """Return a vector that repeats a single number."""
        return self._made(splat(self.builder, self.value, count))

    def filled(self, value: float) -> Numbers:
        """Return as many numbers, all equal to `value`."""
        return self._made(constant(F64, self.value.type.count, value))


def choose(condition: Any, yes: Numbers, no: Numbers) -> Numbers:
    """Return `yes` where the condition holds, else `no`."""
    return Numbers(yes.builder, yes.builder.select(condition, yes.value, no.value))
