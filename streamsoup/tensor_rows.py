"""A tensor of a view that is made when it is indexed, and no further than its rows that are asked for."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from streamsoup.view import SoupView


class TensorRows:
    """A tensor of a `SoupView` that is made when it is indexed, and as far as that.

    Integers and slices along the first axis read those rows; what comes behind them is applied to the rows that were
    made, as torch does. Any other index, and a method that must look at the whole tensor, makes all of it first.

    Attributes
    ----------
    shape : tuple of int
    dtype : torch.dtype
    """

    def __init__(self, view: SoupView, name: str) -> None:
        self.shape = view.shape(name)
        self._view = view
        self._name = name

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self._view.dtype(self._name)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self._name}: has no rows, since it is a single number.")
        return self.shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        if not self.shape or isinstance(first, bool) or not (hasattr(first, "__index__") or isinstance(first, slice)):
            return self._view[self._name][index]
        if getattr(first, "ndim", 0):  # a tensor of one element passes for an integer
            return self._view[self._name][index]
        if isinstance(first, slice):
            wanted = range(*first.indices(self.shape[0]))
            if wanted.step < 0:
                raise ValueError(f"{self._name}: step {wanted.step}, but tensors take steps above zero only.")
            rows = self._view.rows(self._name, wanted.start, max(wanted.start, wanted[-1] + 1 if wanted else 0))
            return rows[(slice(None, None, wanted.step), *rest)]
        row = operator.index(first)
        if not -self.shape[0] <= row < self.shape[0]:
            raise IndexError(f"{self._name}: row {row} of {self.shape[0]}.")
        row %= self.shape[0]
        return self._view.rows(self._name, row, row + 1)[(0, *rest)]
