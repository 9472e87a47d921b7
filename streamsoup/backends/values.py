"""The numbers of a tile as methods see them, on any device of torch. On the CPU they are traced instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from streamsoup.backends.rows import row_sums, stream_keys
from streamsoup.kernels.torch_measuring import uniform
from streamsoup.methods.protocol import Array, TensorInfo


class TorchValues:
    """See `Values`.

    Parameters
    ----------
    rows : float64 Tensor, shape (checkpoints, n)
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
        return torch.where(condition, yes, no)

    def sign(self, array: Array) -> Array:
        """See `Values`."""
        return array.sign()

    def number(self, value: float) -> Array:
        """See `Values`."""
        return torch.full((), value, dtype=torch.float64, device=self.rows.device)

    def column(self, numbers: tuple[float, ...]) -> Array:
        """See `Values`."""
        return torch.tensor(numbers, dtype=torch.float64, device=self.rows.device)[:, None]

    def total(self, array: Array) -> Array:
        """See `Values`."""
        found = array[0]
        for row in array[1:]:
            found = found + row
        return found

    def sqrt(self, array: Array) -> Array:
        """See `Values`. Torch's own on the CPU is off by a bit for one number in a hundred."""
        return torch.from_numpy(np.sqrt(array.numpy())) if array.device.type == "cpu" else array.sqrt()

    def stack(self, arrays: Sequence[Array]) -> Array:
        """See `Values`."""
        return torch.stack(list(arrays))

    def single(self, array: Array) -> Array:
        """See `Values`."""
        return array.float().double()

    def uniform(self, seed: int, streams: int) -> Array:
        """See `Values`."""
        keys = stream_keys(seed, streams, self.tensor.name)
        return uniform(keys, self._start, self.rows.shape[1], self.rows.device)

    def row_ranks(self, array: Array) -> Array:
        """See `Values`."""
        by_row = array.reshape(-1, self.tensor.width)
        places = torch.arange(self.tensor.width, device=array.device)
        order = ((by_row.float().view(torch.int32).long() << 32) | places).sort(dim=1).values & 0xFFFFFFFF
        ranks = torch.empty_like(by_row).scatter_(1, order, places.double().expand_as(by_row))
        return ranks.reshape(array.shape)

    def row_dot(self, a: Array, b: Array) -> Array:
        """See `Values`."""
        return row_sums(a * b, self.tensor.width)[0]

    def apply(self, function: Callable[[Any], Any], array: Array) -> Array:
        """See `Values`."""
        return torch.from_numpy(function(array.cpu().numpy())).to(array.device)
