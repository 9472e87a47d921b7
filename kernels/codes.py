"""Dtypes of the kernels as plain integers, with the sizes and limits that both backends read from here."""

from typing import Final

__all__ = [
    "BF16",
    "BLOCK",
    "CANONICAL_NAN",
    "F8_E4M3",
    "F8_E4M3FNUZ",
    "F8_E5M2",
    "F8_E5M2FNUZ",
    "F16",
    "F32",
    "F64",
    "ITEMSIZE",
    "NONFINITE_MASK",
    "NONFINITE_VALUE",
    "PAIR",
]

BF16: Final = 0
F16: Final = 1
F32: Final = 2
F64: Final = 3
F8_E4M3: Final = 4
"""OCP e4m3fn: no infinity, one NaN per sign."""
F8_E5M2: Final = 5
F8_E4M3FNUZ: Final = 6
F8_E5M2FNUZ: Final = 7
PAIR: Final = 8
"""An unevaluated sum of two float64, stored hi, lo: `combine_wide` only."""

ITEMSIZE: Final = (2, 2, 4, 8, 1, 1, 1, 1, 16)
"""Bytes an element, by code."""

BLOCK: Final = 2048
"""Elements, counted from the start of a tensor, that one digest covers and one accumulator holds."""

# An element is NaN or infinite when (bits & mask) == value; one rule serves every format.
# PAIR is judged by its high half.
NONFINITE_MASK: Final = (
    0x7F80,
    0x7C00,
    0x7F800000,
    0x7FF0000000000000,
    0x7F,
    0x7C,
    0xFF,
    0xFF,
    0x7FF0000000000000,
)
NONFINITE_VALUE: Final = (
    0x7F80,
    0x7C00,
    0x7F800000,
    0x7FF0000000000000,
    0x7F,
    0x7C,
    0x80,
    0x80,
    0x7FF0000000000000,
)
CANONICAL_NAN: Final = (
    0x7FC0,
    0x7E00,
    0x7FC00000,
    0x7FF8000000000000,
    0x7F,
    0x7E,
    0x80,
    0x80,
    0x7FF8000000000000,
)
"""The one NaN that the kernels write, so that no bit depends on which operand's payload a CPU keeps."""
