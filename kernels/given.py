"""What the loop of `combine` is given beside its tile: memory, how to divide, where the proof applies. No numba."""

import math

import numpy as np
from numpy.typing import NDArray

from .codes import BF16, BLOCK, F16

__all__ = [
    "DIVIDE",
    "GROUP",
    "MARKS",
    "MULTIPLY",
    "PLACES",
    "SLOT",
    "SLOTS",
    "SPARE",
    "STAGE",
    "STRIP",
    "division",
    "limits",
    "scratch",
]

MULTIPLY, DIVIDE = 0, 1
"""How `finish` divides: by an exact reciprocal, or by the divider.

To bfloat16 the first took 0.43 ns an element on one 3 GHz core, the second 0.55; a product with the rounded
reciprocal, corrected to the true quotient by fused remainders, 0.74.
"""

GROUP = 8
"""Sources read side by side."""

STRIP = 512
"""Elements of 8-bit sources that are expanded to float32 at a time."""

SLOT = 64
"""Bytes of a source's two digest sums, four lanes each."""

STAGE, SPARE, MARKS = 8 * BLOCK, 8 * BLOCK + 4 * GROUP * STRIP, 16 * BLOCK + 4 * GROUP * STRIP
PLACES = MARKS + 2 * BLOCK
SLOTS = PLACES + 8 * GROUP
"""Where in the scratch lie, in bytes: the sums of a block, at 0; expanded sources; a block of output, for work in
place; marks; addresses of expanded sources; and the sources' digest sums, SLOT bytes each."""


def scratch(sources: int) -> NDArray[np.uint8]:
    """Return the memory that the loop of `combine` works in.

    The caller holds it: numba frees an array of its own after the last use, and taking the address is no use.
    """
    room = np.empty(SLOTS + SLOT * sources, np.uint8)
    room[SLOTS:] = 0
    return room


def division(divisor: float) -> tuple[float, int]:
    """Choose how to divide so that the bits are those of a true division.

    Parameters
    ----------
    divisor : float
        Divides every accumulator.

    Returns
    -------
    reciprocal : float
        1 / divisor where that is exact, otherwise unused.
    mode : int
        MULTIPLY for powers of two, whose reciprocals are exact; DIVIDE otherwise.
    """
    if 2.0**-500 < abs(divisor) < 2.0**500 and abs(math.frexp(divisor)[0]) == 0.5:
        return 1.0 / divisor, MULTIPLY
    return 1.0, DIVIDE


def limits(sources: int, code: int, divisor: float) -> tuple[int, int, int]:
    """Return what `mean` needs to know of a mean of numbers of one dtype, in 16-bit patterns.

    Parameters
    ----------
    sources, code : int
        How many numbers an element is the mean of, and their dtype.
    divisor : float

    Returns
    -------
    gap : int
        How far the smallest magnitude may lie below the largest; 0 where the method does not apply.
    top, bottom : int
        The largest magnitude that cannot overflow, and the smallest whose quotients are normal.
    """
    size = abs(divisor)
    if code not in (BF16, F16) or not (1.0 <= size < 4096.0 and size.is_integer()):
        return 0, 0, 0
    bits = (sources - 1).bit_length()
    # 24 bits, less those of the mantissa and one, as a number reaches up to twice its power of two.
    exponents = (16 if code == BF16 else 13) - bits
    if exponents < 4:
        # Hardly ever enough: more than 2**12 sources of bfloat16, 2**9 of float16.
        return 0, 0, 0
    if code == BF16:
        return exponents << 7, (253 - bits) << 7, 21 << 7
    room = int(size).bit_length() - 1
    return exponents << 10, min((30 - bits + room) << 10, 0x7BFF), 0
