"""8-bit floats with a scale for each block of a matrix: to float32 and back, any run of elements.

A tensor is a stack of matrices of `rows` times `columns`, each covered by blocks from its first element on, those at
its ends cut off. Scales are float32, row after row of blocks, matrix after matrix. Loops take an address of those that
are needed, the first of which has the number `first_scale`.
"""

from .stored import entry

__all__ = ["dequantise", "largest", "prepare", "quantise"]


def dequantise(
    source: int,
    code: int,
    first: int,
    count: int,
    grid: tuple[int, int, int, int],
    scales: int,
    first_scale: int,
    out: int,
) -> None:
    """Write 8-bit floats times their scales as float32: the exact product, rounded once.

    Parameters
    ----------
    source : int
        Address of the elements, of one of the four 8-bit codes.
    code : int
    first, count : int
        Number of the first element in its tensor, and how many there are.
    grid : (rows, columns, block rows, block columns)
    scales : int
        Address; any alignment.
    first_scale : int
    out : int
        Address of `count` float32; any alignment. Changed.

    Notes
    -----
    Memory: none. Releases the GIL. NaNs are canonical. Source: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2.
    """
    entry("dequantise")(source, code, first, count, *grid, scales, first_scale, out)


def largest(
    source: int, code: int, first: int, count: int, grid: tuple[int, int, int, int], maxima: int, first_scale: int
) -> None:
    """Raise the maxima of blocks to the largest magnitudes among some elements.

    Parameters
    ----------
    source : int
        Address of the elements; BF16, F16 or F32.
    code, first, count, grid, first_scale
        As of `dequantise`.
    maxima : int
        Address of float32 numbers, not negative, one for each block, as scales are. Changed; a NaN is the largest.

    Notes
    -----
    Memory: none. Releases the GIL. No order matters. Source: own.
    """
    entry("largest")(source, code, first, count, *grid, maxima, first_scale, maxima)


def quantise(
    source: int,
    code: int,
    first: int,
    count: int,
    grid: tuple[int, int, int, int],
    scales: int,
    first_scale: int,
    out: int,
) -> None:
    """Write elements divided by their scales as e4m3.

    The quotient is rounded to float32, cut off at 448, and rounded to nearest even e4m3; a NaN is 0x7F.

    Parameters
    ----------
    source : int
        Address of the elements; BF16, F16 or F32.
    code, first, count, grid, scales, first_scale
        As of `dequantise`.
    out : int
        Address of `count` bytes. Changed.

    Notes
    -----
    Memory: none. Releases the GIL. Source: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2; OCP 8-bit Floating Point
    Specification 1.0, section 5.
    """
    entry("quantise")(source, code, first, count, *grid, scales, first_scale, out)


def prepare(*names: str) -> None:
    """Compile some of these, or load them."""
    for name in names:
        entry(name)
