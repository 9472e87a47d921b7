"""The digest of a block, compiled: what `kernels.digest` documents."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

import numba
import numpy as np

from .digest_vectors import digest_sums
from .lanes import load_u8, load_u64, store_u64

__all__ = ["block_digest", "mix", "settle"]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_INDEX = np.uint64(0xBF58476D1CE4E5B9)
_LOW = np.uint64(0xFFFFFFFF)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)


@numba.njit(inline="never")
def mix(value):
    """Return splitmix64's finaliser of a uint64 (Steele, Lea and Flood, OOPSLA 2014, figure 16)."""
    value = (value ^ (value >> _S30)) * _M1
    value = (value ^ (value >> _S27)) * _M2
    return value ^ (value >> _S31)


@numba.njit(nogil=True)
def _finish(s1, s2, address, nbytes, first, block):
    """Complete the sums with the words from number `first`, and return the digest."""
    words = nbytes >> 3
    for j in range(first, words):
        word = load_u64(address + np.uint64(8) * np.uint64(j))
        a = word + (np.uint64(j) + np.uint64(1)) * _STEP
        s1 += (a & _LOW) * (a >> _S32)
        s2 += word
    rest = nbytes & 7
    if rest:
        word = np.uint64(0)
        for j in range(rest):
            byte = load_u8(address + np.uint64(8 * words + j))
            word |= byte << np.uint64(8 * j)
        a = word + (np.uint64(words) + np.uint64(1)) * _STEP
        s1 += (a & _LOW) * (a >> _S32)
        s2 += word
    return mix(s1 ^ mix(s2 + (np.uint64(block) + np.uint64(1)) * _INDEX))


@numba.njit(nogil=True)
def block_digest(address, nbytes, block):
    """Return the digest of one block of `nbytes` bytes at `address` whose number in its tensor is `block`.

    The products are 32 by 32 bits (vpmuludq); s2 is there because a product forgets the low half of a word
    whenever the high half is zero.
    """
    words = nbytes >> 3
    s1, s2 = digest_sums(address, words)  # type: ignore[call-arg]
    return _finish(s1, s2, address, nbytes, words & ~np.int64(15), block)


@numba.njit(nogil=True)
def settle(slot, address, nbytes, words, block):
    """Return the same digest where `absorb` has added the first `words` words at `slot`, and empty the slot."""
    s1, s2 = np.uint64(0), np.uint64(0)
    for lane in range(4):
        here = slot + np.uint64(8 * lane)
        s1 += load_u64(here)
        s2 += load_u64(here + np.uint64(32))
        store_u64(here, np.uint64(0))
        store_u64(here + np.uint64(32), np.uint64(0))
    return _finish(s1, s2, address, nbytes, words, block)
