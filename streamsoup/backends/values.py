"""The numbers of a tile, decoded, as methods see them: arrays of numpy or of torch, with the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from streamsoup.methods.protocol import Array, TensorInfo


class NumpyValues:
    """See `Values`; on the CPU.

    Parameters
    ----------
    rows : float64 array, shape (checkpoints, n)
    tensor : TensorInfo
    start : int
        Place in the tensor of the first element.
    """

    def __init__(self, rows: Array, tensor: TensorInfo, start: int) -> None:
        self.rows = rows
        self.tensor = tensor
        self._start = start

    def where(self, condition: Array, yes: Array, no: Array | float) -> Array:
        """See `Values`."""
        return np.where(condition, yes, no)

    def sign(self, array: Array) -> Array:
        """See `Values`."""
        return np.sign(array)

    def column(self, numbers: tuple[float, ...]) -> Array:
        """See `Values`."""
        return np.array(numbers)[:, None]

    def total(self, array: Array) -> Array:
        """See `Values`."""
        found = array[0]
        for row in array[1:]:
            found = found + row
        return found

    def sqrt(self, array: Array) -> Array:
        """See `Values`."""
        return np.sqrt(array)

    def stack(self, arrays: list[Array]) -> Array:
        """See `Values`."""
        return np.stack(arrays)

    def single(self, array: Array) -> Array:
        """See `Values`."""
        return array.astype(np.float32).astype(np.float64)

    def uniform(self, seed: int, streams: int) -> Array:
        """See `Values`."""
        from streamsoup.kernels.measuring import uniform

        return uniform(np.array(self._keys(seed, streams), np.uint64), self._start, self.rows.shape[1])

    def _keys(self, seed: int, streams: int) -> list[int]:
        texts = (f"{seed}\0{stream}\0{self.tensor.name}" for stream in range(streams))
        return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts]

    def row_ranks(self, array: Array) -> Array:
        """See `Values`."""
        by_row = array.reshape(*array.shape[:-1], -1, self.tensor.width)
        ranks = by_row.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
        return ranks.reshape(array.shape).astype(np.float64)

    def row_dot(self, a: Array, b: Array) -> Array:
        """See `Values`."""
        products = self._by_halves((a * b).reshape(-1, self.tensor.width))
        return products.repeat(self.tensor.width)

    def _by_halves(self, rows: Array) -> Array:
        """Add the elements of each row in an order that depends on their number alone, shape (rows,)."""
        while (length := rows.shape[-1]) > 1:
            half = length // 2
            added = rows[..., :half] + rows[..., half : 2 * half]
            if length % 2:
                added[..., 0] += rows[..., -1]
            rows = added
        return rows[..., 0]

    def apply(self, function: Callable[[Any], Any], array: Array) -> Array:
        """See `Values`."""
        return function(array)


class TorchValues(NumpyValues):
    """See `Values`; on any device of torch."""

    def where(self, condition: Array, yes: Array, no: Array | float) -> Array:
        """See `Values`."""
        import torch

        return torch.where(condition, yes, no)

    def sign(self, array: Array) -> Array:
        """See `Values`."""
        return array.sign()

    def column(self, numbers: tuple[float, ...]) -> Array:
        """See `Values`."""
        import torch

        return torch.tensor(numbers, dtype=torch.float64, device=self.rows.device)[:, None]

    def sqrt(self, array: Array) -> Array:
        """See `Values`."""
        return array.sqrt()

    def stack(self, arrays: list[Array]) -> Array:
        """See `Values`."""
        import torch

        return torch.stack(arrays)

    def single(self, array: Array) -> Array:
        """See `Values`."""
        return array.float().double()

    def uniform(self, seed: int, streams: int) -> Array:
        """See `Values`."""
        from streamsoup.kernels.torch_measuring import uniform

        return uniform(self._keys(seed, streams), self._start, self.rows.shape[1], self.rows.device)

    def row_ranks(self, array: Array) -> Array:
        """See `Values`."""
        by_row = array.reshape(*array.shape[:-1], -1, self.tensor.width)
        order = by_row.argsort(dim=-1, stable=True)
        return order.argsort(dim=-1, stable=True).reshape(array.shape).double()

    def row_dot(self, a: Array, b: Array) -> Array:
        """See `Values`."""
        products = self._by_halves((a * b).reshape(-1, self.tensor.width))
        return products.repeat_interleave(self.tensor.width)

    def apply(self, function: Callable[[Any], Any], array: Array) -> Array:
        """See `Values`."""
        import torch

        return torch.from_numpy(function(array.cpu().numpy())).to(array.device)
