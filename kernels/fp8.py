"""The four 8-bit float formats: their parameters, and tables that decode them."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .codes import F8_E4M3, F8_E4M3FNUZ, F8_E5M2, F8_E5M2FNUZ

__all__ = ["FORMATS", "Format8", "decode", "decode_tables", "encoder_parameters"]


@dataclass(frozen=True, slots=True)
class Format8:
    """One 8-bit float format.

    Parameters
    ----------
    mantissa : int
        Stored mantissa bits.
    bias : int
        Exponent bias; the smallest normal number is 2**(1 - bias).
    largest : float
        The largest finite value.
    nan : int
        The NaN that is written.
    infinity : int
        What is written above `largest`: the infinity, or `nan` where the format has none.
    signed_zero : bool
        Whether -0.0 exists; in the "fnuz" formats its code is the NaN.
    """

    mantissa: int
    bias: int
    largest: float
    nan: int
    infinity: int
    signed_zero: bool


FORMATS = {
    F8_E4M3: Format8(3, 7, 448.0, 0x7F, 0x7F, True),
    F8_E5M2: Format8(2, 15, 57344.0, 0x7E, 0x7C, True),
    F8_E4M3FNUZ: Format8(3, 8, 240.0, 0x80, 0x80, False),
    F8_E5M2FNUZ: Format8(2, 16, 57344.0, 0x80, 0x80, False),
}


def decode(code: int) -> NDArray[np.float64]:
    """Return the value of each of the 256 bytes of a format.

    Parameters
    ----------
    code : int
        One of the four 8-bit codes.

    Returns
    -------
    ndarray, shape (256,), float64
        NaN for every NaN; -0.0 where the format has it.

    Notes
    -----
    Source: OCP 8-bit Floating Point Specification 1.0, section 5; for "fnuz", Noune et al., arXiv 2206.02915.
    """
    form = FORMATS[code]
    byte = np.arange(256)
    magnitude = byte & 0x7F
    exponent = magnitude >> form.mantissa
    fraction = magnitude & ((1 << form.mantissa) - 1)
    significand = np.where(exponent > 0, fraction + (1 << form.mantissa), fraction)
    value: NDArray[np.float64] = np.ldexp(
        significand.astype(np.float64), np.maximum(exponent, 1) - form.bias - form.mantissa
    )
    if form.infinity != form.nan:
        value[magnitude == form.infinity] = np.inf
    value[value > form.largest] = np.where(magnitude == form.infinity, np.inf, np.nan)[value > form.largest]
    if form.infinity == form.nan and form.signed_zero:
        value[magnitude == form.nan] = np.nan
    value[128:] *= -1.0
    if not form.signed_zero:
        value[form.nan] = np.nan
    return value


@cache
def decode_tables() -> NDArray[np.float32]:
    """Return the four decoding tables, shape (4, 256), in the order of the codes; exact in float32, read-only."""
    tables = np.stack([decode(code) for code in sorted(FORMATS)]).astype(np.float32)
    tables.setflags(write=False)
    return tables


@cache
def encoder_parameters() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return what the encoder reads, a row a format in the order of the codes.

    Returns
    -------
    reals : ndarray, shape (4, 2), float64
        Smallest normal number, largest finite number.
    integers : ndarray, shape (4, 4), int64
        Mantissa bits, code of NaN, code above the largest, whether -0.0 exists.
    """
    forms = [FORMATS[code] for code in sorted(FORMATS)]
    reals = np.array([[2.0 ** (1 - form.bias), form.largest] for form in forms])
    integers = np.array(
        [[form.mantissa, form.nan, form.infinity, int(form.signed_zero)] for form in forms], dtype=np.int64
    )
    return reals, integers
