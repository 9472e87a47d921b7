"""Combine a tile of several checkpoints into one: the numba backend's entries."""

import ctypes
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fp8 import decode_tables, encoder_parameters
from .given import division, limits, scratch
from .stored import entry

__all__ = ["combine", "combine_single", "combine_wide", "digest", "read_sum"]


@cache
def _prepared(name: str) -> tuple[Any, int, int]:
    reals, integers = encoder_parameters()
    return entry(name), reals.ctypes.data, integers.ctypes.data


@lru_cache(1024)
def _choices(sources: int, code: int, divisor: float) -> tuple[Any, ...]:
    return division(divisor), limits(sources, code, divisor)


def _at(array: Any) -> int:
    """Address of a writable array; in a third of the time of `ctypes.data`."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array))


# As `_choices` where one loop divides by itself, and no proof applies.
_NO_CHOICE = (1.0, 0), (0, 0, 0)


def _call(
    name: str,
    sources: tuple[Any, ...],
    divisor: float,
    chosen: tuple[Any, ...],
    place: tuple[int, ...],
    found: tuple[Any, ...],
) -> int:
    """Call a loop that takes what `combine` does; how to divide, and where the proof applies, was chosen."""
    loop, reals, integers = _prepared(name)
    (reciprocal, mode), bounds = chosen
    count = len(sources[0])
    room = scratch(count)
    rows = (count, *map(_at, sources[1:]))
    return int(
        loop(
            _at(sources[0]), *rows, divisor, reciprocal, mode, *place, *map(_at, found), reals, integers, *bounds,
            _at(room),
        )
    )  # fmt: skip


@cache
def _prepared_wide() -> tuple[Any, Any, Any, int, Any, Any]:
    from . import native, native_wide

    functions = native.wide_loop(), native_wide.wide_scratch, native_wide.inverse_of
    return *functions, decode_tables().ctypes.data, *encoder_parameters()


def combine(
    sources: NDArray[np.uint64],
    codes: NDArray[np.uint8],
    weights: NDArray[np.float64],
    divisor: float,
    elements: int,
    first_block: int,
    out: int,
    out_code: int,
    hashed: NDArray[np.uint8],
    digests: NDArray[np.uint64],
    nonfinite: NDArray[np.int64],
) -> int:
    """Write Σ weights[i]·source[i] / divisor of one tile, accumulated in float64 and rounded once.

    Parameters
    ----------
    sources : ndarray, shape (N,), uint64
        Addresses of the first element of the tile in every source; any alignment.
    codes : ndarray, shape (N,), uint8
        Their dtypes (`codes`), float64 included, PAIR excluded; they may differ.
    weights : ndarray, shape (N,), float64
    divisor : float
        Divides the sum by a true division.
    elements : int
        Elements of the tile.
    first_block : int
        Number of the tile's first block in its tensor: its first element over BLOCK.
    out : int
        Address of the output. It overlaps no source, or is exactly one of them with the same itemsize.
    out_code : int
        The output's dtype.
    hashed : ndarray, shape (N,), uint8
        Whether to digest source i.
    digests : ndarray, shape (N,), uint64
        Changed: the digest of the tile's blocks is added (modulo 2**64).
    nonfinite : ndarray, shape (N,), int64
        Changed: the number of NaN and infinite elements is added, for each block with a non-finite result.

    Returns
    -------
    int
        Output elements that are not finite although every source element there was.

    Notes
    -----
    Memory: 52 KiB and 64 bytes a source; each source byte is read once.
    All arrays must be C-contiguous and writable; releases the GIL. Source: own.
    """
    place = (elements, first_block, out, out_code)
    chosen = _choices(len(sources), out_code, divisor)
    return _call("combine", (sources, codes, weights), divisor, chosen, place, (hashed, digests, nonfinite))


def combine_single(
    sources: NDArray[np.uint64],
    codes: NDArray[np.uint8],
    weights: NDArray[np.float64],
    divisor: float,
    elements: int,
    first_block: int,
    out: int,
    out_code: int,
    hashed: NDArray[np.uint8],
    digests: NDArray[np.uint64],
    nonfinite: NDArray[np.int64],
) -> int:
    """Do what `combine` does in float32: weights, divisor, products, sums and the quotient are rounded to it.

    Parameters
    ----------
    sources, codes, weights, divisor, elements, first_block, out, out_code, hashed, digests, nonfinite
        As in `combine`; a float64 source (of sums so far) holds float32 numbers.

    Returns
    -------
    int
        Output elements that are not finite although every source element there was.

    Notes
    -----
    Memory: as `combine`. Source: own.
    """
    place = (elements, first_block, out, out_code)
    return _call("singles", (sources, codes, weights), divisor, _NO_CHOICE, place, (hashed, digests, nonfinite))


def combine_wide(
    sources: NDArray[np.uint64],
    codes: NDArray[np.uint8],
    weights: NDArray[np.float64],
    divisor: float,
    divisor_low: float,
    elements: int,
    first_block: int,
    out: int,
    out_code: int,
    hashed: NDArray[np.uint8],
    digests: NDArray[np.uint64],
    nonfinite: NDArray[np.int64],
) -> int:
    """Do what `combine` does in double-double: for checkpoints that hold float64.

    Parameters
    ----------
    divisor, divisor_low : float
        The divisor as an unevaluated sum; (1.0, 0.0) for none.
    sources, codes, weights, elements, first_block, out, out_code, hashed, digests, nonfinite
        As in `combine`; PAIR is also a source, the first one and with weight 1, and also an output.
        Weights and divisor lie between 2**-400 and 2**400 in size.

    Returns
    -------
    int
        Output elements that are not finite although every source element there was: true overflow only, since
        sums of numbers above 2**500 are scaled.

    Notes
    -----
    An element with a NaN or infinity in a source is the plain float64 sum over the divisor's high half.
    Memory: 68 KiB; each source byte is read from memory once, and again from cache. Source: see `pairs`.
    """
    loop, scratch, inverse_of, tables, reals, integers = _prepared_wide()
    inverse = inverse_of(divisor, divisor_low)
    return int(
        loop(
            sources, codes, weights, divisor, divisor_low, inverse, elements, first_block, out, out_code,
            hashed, digests, nonfinite, tables, reals, integers, scratch(),
        )
    )  # fmt: skip


def digest(address: int, nbytes: int, itemsize: int, first_block: int) -> int:
    """Return the digest of a run of whole blocks (and possibly the tensor's shorter last one).

    Parameters
    ----------
    address : int
        Where the run begins; any alignment.
    nbytes, itemsize : int
        Bytes in the run, and in an element: a block is BLOCK elements.
    first_block : int
        Number of the run's first block in its tensor.

    Returns
    -------
    int
        0 <= digest < 2**64. Digests of disjoint runs of one tensor add up (modulo 2**64) to that of the union.

    Notes
    -----
    With w the block's little-endian 64-bit words (zero-padded), K = 0x9E3779B97F4A7C15 and all arithmetic
    modulo 2**64: a_j = w_j + (j+1)K, s1 = Σ (a_j mod 2**32)·(a_j div 2**32), s2 = Σ w_j; the block's digest is
    mix(s1 xor mix(s2 + (b+1)·0xBF58476D1CE4E5B9)), mix being splitmix64's finaliser. It notices change; it
    does not withstand an adversary. Source: own, after NH (Black et al., CRYPTO 1999).
    """
    return int(entry("digest")(address, nbytes, itemsize, first_block))


def read_sum(address: int, nbytes: int) -> int:
    """Return the sum of the 64-bit words at `address`: the floor that no kernel reading them can beat."""
    from . import native

    return int(native.sum_loop()(address, nbytes))
