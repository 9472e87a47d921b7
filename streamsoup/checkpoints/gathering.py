"""Elements that lie apart are gathered: a tile of a tensor, out of its pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints.table import TensorTable
from streamsoup.maps import address_of
from streamsoup.source import STRIP_BYTES, PartReader, Source

# Of what is read for elements that lie apart, at least this share is used, unless it is little anyway.
_USED_SHARE = 1 / 8
_LITTLE_BYTES = 1 << 16  # read in the time that Python takes to ask for it
_BLOCK_BYTES = 1 << 14
_UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class PackedPieces:
    """The pieces of all tensors of a checkpoint as arrays; elements are counted in `dims`, `strides` and `offsets`.

    Attributes
    ----------
    firsts : int64 array, shape (tensors + 1,)
        The first piece of each tensor.
    dim_starts : int64 array, shape (pieces + 1,)
        Where a piece begins in the other arrays.
    offsets, sizes, strides : int64 array
    """

    firsts: npt.NDArray[np.int64]
    dim_starts: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    strides: npt.NDArray[np.int64]


def is_contiguous(sizes: Sizes, strides: Sizes) -> bool:
    """Whether elements lie one after the other, in order."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def row_major(sizes: Sizes) -> Sizes:
    """Strides of elements that lie one after the other."""
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


def reach_of(sizes: Sizes, strides: Sizes) -> int:
    """Elements from the first to the last, without the first; sizes are not zero."""
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _boxes(shape: Sizes, start: int, stop: int) -> Iterator[tuple[Sizes, Sizes]]:
    """Cut elements `start` to `stop` - 1, of which there is one, into rectangles: offsets and sizes, in order."""
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    first, after = divmod(start, inner)
    last, before = divmod(stop, inner)
    if first == last:
        yield from (((first, *o), (1, *s)) for o, s in _boxes(shape[1:], after, before))
        return
    if after:
        yield from (((first, *o), (1, *s)) for o, s in _boxes(shape[1:], after, inner))
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if before:
        yield from (((last, *o), (1, *s)) for o, s in _boxes(shape[1:], 0, before))


@dataclass(frozen=True, slots=True)
class _Cut:
    """Elements of a piece that are wanted: the first, counted in its span, and where they go in a tile."""

    piece: int
    first: int
    sizes: Sizes
    strides: Sizes
    tile_first: int
    tile_strides: Sizes

    @property
    def reach(self) -> int:
        """Elements from the first to the last, without the first."""
        return reach_of(self.sizes, self.strides)

    @property
    def is_run(self) -> bool:
        """Whether they lie one after the other, here and there."""
        return is_contiguous(self.sizes, self.strides) and is_contiguous(self.sizes, self.tile_strides)

    def is_dense(self, item: int) -> bool:
        """Whether all that lies between may be read for them."""
        return (self.reach + 1) * item <= _LITTLE_BYTES or math.prod(self.sizes) >= self.reach * _USED_SHARE

    def halves(self) -> tuple[_Cut, _Cut]:
        """Cut it across the dimension that reaches farthest."""
        reaches = [(size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True)]
        axis = reaches.index(max(reaches))
        half = self.sizes[axis] // 2
        one = (*self.sizes[:axis], half, *self.sizes[axis + 1 :])
        other = (*self.sizes[:axis], self.sizes[axis] - half, *self.sizes[axis + 1 :])
        return (
            _Cut(self.piece, self.first, one, self.strides, self.tile_first, self.tile_strides),
            _Cut(
                self.piece,
                self.first + half * self.strides[axis],
                other,
                self.strides,
                self.tile_first + half * self.tile_strides[axis],
                self.tile_strides,
            ),
        )


class PiecedSource(Source):
    """Copies elements of pieces to where they belong. See `Source`."""

    def __init__(self, part: PartReader, table: TensorTable, pieces: PackedPieces) -> None:
        self._part = part
        self._table = table
        self._pieces = pieces

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        assert staging is not None
        item = self._table.dtype(position).itemsize
        tile = np.frombuffer(staging, np.uint8, nbytes).view(_UNITS[item])
        for cut in self._cuts(position, offset // item, (offset + nbytes) // item):
            self._copy(cut, tile, item)
        return address_of(staging)

    def load(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`. Elements that are far apart share their pages with others: all of the piece is read then."""
        item = self._table.dtype(position).itemsize
        for cut in self._cuts(position, offset // item, (offset + nbytes) // item):
            if cut.is_dense(item):
                self._part.source.load(cut.piece, cut.first * item, (cut.reach + 1) * item)
            elif self._piece(cut.piece).is_dense(item):
                self._part.source.load(cut.piece, 0, (self._piece(cut.piece).reach + 1) * item)

    def drop(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        item = self._table.dtype(position).itemsize
        for cut in self._cuts(position, offset // item, (offset + nbytes) // item):
            if cut.is_dense(item):
                self._part.source.drop(cut.piece, cut.first * item, (cut.reach + 1) * item)

    def close(self) -> None:
        """See `Source`."""
        self._part.source.close()

    def _piece(self, number: int) -> _Cut:
        dims = slice(*self._pieces.dim_starts[number : number + 2].tolist())
        sizes, strides = self._pieces.sizes[dims].tolist(), self._pieces.strides[dims].tolist()
        return _Cut(number, 0, tuple(sizes), tuple(strides), 0, tuple(strides))

    def _cuts(self, position: int, start: int, stop: int) -> Iterator[_Cut]:
        """Yield what pieces have of elements `start` to `stop` - 1."""
        if start == stop:
            return
        shape = self._table.shape(position)
        first, last = self._pieces.firsts[position : position + 2].tolist()
        dims = slice(*self._pieces.dim_starts[[first, last]].tolist())
        rows = (last - first, len(shape))
        offsets, sizes = self._pieces.offsets[dims].reshape(rows), self._pieces.sizes[dims].reshape(rows)
        strides = self._pieces.strides[dims].reshape(rows)
        done = 0
        for box_offsets, box_sizes in _boxes(shape, start, stop):
            corner = np.array(box_offsets, np.int64)
            lows = np.maximum(corner, offsets)
            counts = np.minimum(corner + np.array(box_sizes, np.int64), offsets + sizes) - lows
            tile_strides = row_major(box_sizes)
            for row in np.flatnonzero((counts > 0).all(axis=1)).tolist():
                yield _Cut(
                    first + row,
                    int((lows[row] - offsets[row]) @ strides[row]),
                    tuple(counts[row].tolist()),
                    tuple(strides[row].tolist()),
                    done + int((lows[row] - corner) @ np.array(tile_strides, np.int64)),
                    tile_strides,
                )
            done += math.prod(box_sizes)

    def _copy(self, cut: _Cut, tile: npt.NDArray[np.unsignedinteger], item: int) -> None:
        waiting, most = [cut], self._part.most_bytes
        buffered = most == STRIP_BYTES  # else nothing is read but what is touched
        while waiting:
            cut = waiting.pop()
            place = cut.piece, cut.first * item, (cut.reach + 1) * item
            if cut.is_run:
                run = tile[cut.tile_first : cut.tile_first + math.prod(cut.sizes)]
                self._part.source.fetch(*place, run.view(np.uint8).data)
            elif place[2] <= most and (not buffered or cut.is_dense(item)):
                with self._part.view(*place) as stored:
                    copy_apart(
                        _strided(tile[cut.tile_first :], cut.sizes, cut.tile_strides),
                        _strided(stored.view(tile.dtype), cut.sizes, cut.strides),
                    )
            else:
                waiting += cut.halves()


def _strided(flat: npt.NDArray[np.unsignedinteger], sizes: Sizes, strides: Sizes) -> npt.NDArray[np.unsignedinteger]:
    return np.lib.stride_tricks.as_strided(flat, sizes, [stride * flat.itemsize for stride in strides])


def copy_apart(target: npt.NDArray[np.integer[Any]], elements: npt.NDArray[np.integer[Any]]) -> None:
    """Copy in blocks with few long runs. Numpy's own order was eight times slower: it misses the cache each time."""
    axis = max(range(elements.ndim), key=lambda a: abs(elements.strides[a]) if elements.shape[a] > 1 else 0)
    if axis == 0:  # numpy's order is that of memory, and to call it for each block took twice the time
        np.copyto(target, elements)
        return
    target, elements = np.moveaxis(target, axis, 0), np.moveaxis(elements, axis, 0)
    step = max(1, _BLOCK_BYTES * len(elements) // elements.nbytes)
    for first in range(0, len(elements), step):
        np.copyto(target[first : first + step], elements[first : first + step])
