"""The digest of a tile in torch: int64 arithmetic wraps as uint64 does; right shifts are masked."""

import torch
from torch import Tensor

from .codes import BLOCK

__all__ = ["digest"]


def _signed(value: int) -> int:
    """Return the int64 that has the bits of a uint64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_M1 = _signed(0xBF58476D1CE4E5B9)
_M2 = _signed(0x94D049BB133111EB)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ ((value >> 30) & (1 << 34) - 1)) * _M1
    value = (value ^ ((value >> 27) & (1 << 37) - 1)) * _M2
    return value ^ ((value >> 31) & (1 << 33) - 1)


def digest(raw: Tensor, itemsize: int, first_block: int) -> Tensor:
    """Return the digest of a run of blocks, as `kernels.combine.digest` defines it.

    Parameters
    ----------
    raw : Tensor, shape (nbytes,), uint8
    itemsize, first_block : int
        Bytes in an element, and the number of the run's first block in its tensor.

    Returns
    -------
    Tensor, shape (), int64
        The digest's 64 bits, signed; on the device of `raw`, and not waited for.

    Notes
    -----
    Memory: about four times `raw`. The padding to a whole block adds terms that the last block's own sum must
    not have, so words beyond the data count nothing.
    """
    if raw.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=raw.device)
    step = BLOCK * itemsize
    blocks = -(-raw.numel() // step)
    padded = torch.zeros(blocks * step, dtype=torch.uint8, device=raw.device)
    padded[: raw.numel()] = raw
    words = padded.view(torch.int64).view(blocks, step // 8)
    number = torch.arange(step // 8, dtype=torch.int64, device=raw.device)
    a = words + (number + 1) * _STEP
    product = (a & 0xFFFFFFFF) * ((a >> 32) & 0xFFFFFFFF)
    rest = raw.numel() - (blocks - 1) * step
    product[-1, -(-rest // 8) :] = 0
    s1, s2 = product.sum(1), words.sum(1)
    block = torch.arange(first_block, first_block + blocks, dtype=torch.int64, device=raw.device)
    return _mix(s1 ^ _mix(s2 + (block + 1) * _M1)).sum()
