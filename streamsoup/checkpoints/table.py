"""The tensors of a checkpoint as packed arrays: about 40 bytes a tensor, names shared between ingredients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from streamsoup.dtypes import DTYPES, DType


@dataclass(frozen=True)
class TensorTable:
    """Names, dtypes, shapes and places of tensors, by position.

    Attributes
    ----------
    names : tuple of str
    dtypes : uint8 array, shape (tensors,)
        Indices into `streamsoup.dtypes.DTYPES`.
    dims : int32 array, or int64 where a size needs it
        All shapes, one after the other.
    dim_starts : int32 array, shape (tensors + 1,)
        Where each shape begins in `dims`.
    shards : int32 array, shape (tensors,)
        Which shard holds the tensor.
    begins : int64 array, shape (tensors,)
        First byte in that shard's file.
    """

    names: tuple[str, ...]
    dtypes: npt.NDArray[np.uint8]
    dims: npt.NDArray[np.int32] | npt.NDArray[np.int64]
    dim_starts: npt.NDArray[np.int32]
    shards: npt.NDArray[np.int32]
    begins: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, position: int) -> tuple[int, ...]:
        """Shape of one tensor."""
        start, stop = self.dim_starts[position : position + 2]
        return tuple(self.dims[start:stop].tolist())

    def dtype(self, position: int) -> DType:
        """Dtype of one tensor."""
        return DTYPES[int(self.dtypes[position])]

    @cached_property
    def elements(self) -> npt.NDArray[np.int64]:
        """Number of elements of each tensor; bytes for packed sub-byte dtypes, which are only ever copied."""
        return self._count_elements()

    def _count_elements(self) -> npt.NDArray[np.int64]:
        counts = np.ones(len(self), np.int64)
        ranks = np.diff(self.dim_starts)
        for axis in range(int(ranks.max(initial=0))):
            has = ranks > axis
            counts[has] *= self.dims[self.dim_starts[:-1][has] + axis]
        bits = np.array([d.bits for d in DTYPES], np.int64)[self.dtypes]
        packed = bits < 8
        counts[packed] = (counts[packed] * bits[packed] + 7) // 8
        return counts

    @property
    def nbytes(self) -> npt.NDArray[np.int64]:
        """Bytes of each tensor; made anew at each call, since most tables are asked once."""
        sizes = np.array([d.itemsize for d in DTYPES], np.int64)
        return self._count_elements() * sizes[self.dtypes]

    def largest_count(self) -> float:
        """Elements of the largest tensor, as a float that cannot overflow; zero sizes count as one."""
        logarithms = np.log2(np.maximum(self.dims, 1).astype(np.float64))
        sums = np.concatenate([[0.0], np.cumsum(logarithms)])
        return float(np.exp2((sums[self.dim_starts[1:]] - sums[self.dim_starts[:-1]]).max(initial=0.0)))

    def positions(self) -> dict[str, int]:
        """Map names to positions; made anew at each call, since a dict takes more than all else together."""
        return {name: i for i, name in enumerate(self.names)}

    @property
    def packed_bytes(self) -> int:
        """Bytes of the arrays (names, shared between equal checkpoints, not counted)."""
        arrays = (self.dtypes, self.dims, self.dim_starts, self.shards, self.begins)
        return sum(a.nbytes for a in arrays)

    def take(self, positions: npt.NDArray[np.int64], names: tuple[str, ...] | None = None) -> TensorTable:
        """Pick tensors, in this order; `names`: new ones for them."""
        ranks = np.diff(self.dim_starts)[positions]
        pieces = [self.dims[slice(*self.dim_starts[i : i + 2])] for i in positions.tolist()]
        return TensorTable(
            names=tuple(self.names[i] for i in positions.tolist()) if names is None else names,
            dtypes=self.dtypes[positions],
            dims=np.concatenate([self.dims[:0], *pieces]),
            dim_starts=np.concatenate([[0], np.cumsum(ranks, dtype=np.int32)]).astype(np.int32),
            shards=self.shards[positions],
            begins=self.begins[positions],
        )

    def same_layout(self, other: TensorTable) -> bool:
        """Whether names and shapes are equal, position by position."""
        return (
            self.names == other.names
            and np.array_equal(self.dim_starts, other.dim_starts)
            and np.array_equal(self.dims, other.dims)
        )


def pack(
    names: Sequence[str],
    dtypes: Sequence[DType],
    shapes: Sequence[Sequence[int]],
    begins: Sequence[int],
    shards: Sequence[int] | None = None,
) -> TensorTable:
    """Make a table of lists."""
    ranks = [len(shape) for shape in shapes]
    dims = np.array([n for shape in shapes for n in shape], np.int64)
    if dims.max(initial=0) < 2**31:
        dims = dims.astype(np.int32)
    return TensorTable(
        names=tuple(names),
        dtypes=np.array([d.index for d in dtypes], np.uint8),
        dims=dims,
        dim_starts=np.concatenate([[0], np.cumsum(ranks, dtype=np.int32)]).astype(np.int32),
        shards=np.zeros(len(names), np.int32) if shards is None else np.array(shards, np.int32),
        begins=np.array(begins, np.int64),
    )


def concatenate(tables: Sequence[TensorTable]) -> TensorTable:
    """Join the tables of a checkpoint's shards; shard numbers are their positions."""
    if len(tables) == 1:
        return tables[0]
    offsets = np.cumsum([0] + [len(t.dims) for t in tables])
    return TensorTable(
        names=tuple(name for t in tables for name in t.names),
        dtypes=np.concatenate([t.dtypes for t in tables]),
        dims=np.concatenate([t.dims for t in tables]),
        dim_starts=np.concatenate(
            [t.dim_starts[:-1] + o for t, o in zip(tables, offsets, strict=False)] + [offsets[-1:]]
        ).astype(np.int32),
        shards=np.concatenate([np.full(len(t), i, np.int32) for i, t in enumerate(tables)]),
        begins=np.concatenate([t.begins for t in tables]),
    )
