"""What methods ask of whole rows of a tensor, and keys of random numbers: equal on every device."""

from __future__ import annotations

import hashlib
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Numbers: TypeAlias = npt.NDArray[np.float64]


def stream_keys(seed: int, streams: int, name: str) -> list[int]:
    """Keys of random numbers: of a seed, each stream, and a tensor's name."""
    texts = (f"{seed}\0{stream}\0{name}" for stream in range(streams))
    return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts]


def row_ranks(rows: Numbers, width: int) -> Numbers:
    """Place of each element, as float32 and not negative, among those of its row of the tensor; shape of `rows`.

    Equal ones by position. The bits of a float32 and the place make one whole number, which numpy sorts fastest.
    """
    by_row = rows.reshape(-1, width)
    bits = by_row.astype(np.float32).view(np.uint32).astype(np.int64)
    order = np.sort((bits << 32) | np.arange(width), axis=1) & 0xFFFFFFFF
    ranks = np.empty(by_row.shape)
    np.put_along_axis(ranks, order, np.arange(width, dtype=np.float64)[None, :], axis=1)
    return ranks.reshape(rows.shape)


def row_sums(rows: Any, width: int) -> Any:
    """Σ over each row of a tensor, at each of its elements, in an order that depends on the width alone: shape (1, n).

    For arrays of numpy and of torch.
    """
    parts = rows.reshape(-1, width)
    while (length := parts.shape[-1]) > 1:
        half = length // 2
        added = parts[..., :half] + parts[..., half : 2 * half]
        if length % 2:
            added[..., 0] += parts[..., -1]
        parts = added
    repeated = parts[..., 0].repeat(width) if isinstance(parts, np.ndarray) else parts[..., 0].repeat_interleave(width)
    return repeated[None, :]
