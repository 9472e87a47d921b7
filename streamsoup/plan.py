"""What will be done, settled before anything is read. Plans are made by `streamsoup.planner`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from streamsoup.align import Alignment
from streamsoup.checkpoints import Checkpoint, LeftOut, TensorTable, is_computed
from streamsoup.dtypes import DTYPES, DType
from streamsoup.layout import Layout
from streamsoup.methods import Coefficients, Linear, Method
from streamsoup.methods.depth import depths
from streamsoup.methods.protocol import TensorInfo
from streamsoup.tiling import TileNeeds, Tiling, row_unit

_WIDE = np.array([d.is_wide for d in DTYPES])
_FLOAT = np.array([d.is_float for d in DTYPES])
_ITEMSIZE = np.array([d.itemsize for d in DTYPES], np.int64)
# Tensors that are measured tile by tile at a time.
MOST_MEASURED = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """A contiguous element range of one tensor: the unit of work."""

    tensor: int
    start: int
    elements: int


@dataclass(frozen=True)
class Plan:
    """All that will be done, settled before anything is read.

    Attributes
    ----------
    checkpoints : tuple of Checkpoint
    method : Method
    alignment : Alignment
    out_dtypes : uint8 array, shape (tensors,)
    layout : Layout
    needs : TileNeeds
    budget_bytes : int
    tiling : Tiling
    staged : bool
        Whether ingredients are read into buffers (and not through maps).
    ahead : bool
        Whether what is mapped is read ahead.
    touched : tuple of (str, int)
        Rules by name, and how many tensors each fits.
    accumulate : {"float64", "float32"}
        In what sums are kept; float64 is double-double where a dtype is float64.
    notes : tuple of str
        What a reader of the soup should know of its ingredients.
    left_out : tuple of LeftOut
        Tensors of the ingredients that do not get into the soup.
    """

    checkpoints: tuple[Checkpoint, ...]
    method: Method
    alignment: Alignment
    out_dtypes: npt.NDArray[np.uint8]
    layout: Layout
    needs: TileNeeds
    budget_bytes: int
    tiling: Tiling
    staged: bool
    ahead: bool = False
    touched: tuple[tuple[str, int], ...] = ()
    accumulate: str = "float64"
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def table(self) -> TensorTable:
        """Names and shapes of the soup's tensors."""
        return self.alignment.table

    @cached_property
    def bytes_to_read(self) -> int:
        """Bytes that will be read of all ingredients: each once, but for tensors too large to be measured at once."""
        return self._bytes(self.readings)

    @cached_property
    def bytes_to_sweep(self) -> int:
        """Bytes that will be gone through, from the disk or from the cache."""
        sweeps = self.method.sweeps + self.method.whole_sweeps
        return self._bytes(lambda t: sweeps if self.method.takes(self.table.names[t]) else 1)

    def _bytes(self, times: Callable[[int], int]) -> int:
        whole = sum(int(c.table.nbytes.sum()) for c in self.checkpoints)
        if self.method.sweeps + self.method.whole_sweeps == 1:
            return whole
        return whole + sum(self.bytes_of(t) * (times(t) - 1) for t in self.averaged)

    @cached_property
    def averaged(self) -> list[int]:
        """The tensors that are combined (and not copied)."""
        return [int(t) for t in np.flatnonzero(self._combined)]

    @cached_property
    def _combined(self) -> npt.NDArray[np.bool_]:
        combined: npt.NDArray[np.bool_] = _FLOAT[self.out_dtypes]
        if self.method.verbatim and not is_computed(self.checkpoints[0]):
            combined &= (self.in_dtypes != self.out_dtypes[:, None]).any(axis=1)
        return combined

    def bytes_of(self, tensor: int) -> int:
        """Bytes of a tensor in all ingredients together."""
        return int(self.table.elements[tensor]) * int(self.bytes_each[tensor])

    def readings(self, tensor: int) -> int:
        """How often a tensor is read: once where its bytes fit the budget, else at every sweep."""
        if not self.method.takes(self.table.names[tensor]):
            return 1
        if self.is_kept(tensor):
            return 1 + self.method.whole_sweeps
        return self.method.sweeps + self.method.whole_sweeps

    def is_kept(self, tensor: int) -> bool:
        """Whether what one sweep read of a tensor is there for the next: in a tile, or in the page cache."""
        if self.staged:
            return self.is_one_tile(tensor)
        return self.is_one_tile(tensor) or self.bytes_of(tensor) <= self.budget_bytes

    def is_one_tile(self, tensor: int) -> bool:
        """Whether a tile holds a whole tensor."""
        return int(self.table.elements[tensor]) <= self.tile_step(tensor)

    def tile_step(self, tensor: int) -> int:
        """Elements of a tile of a tensor; whole rows if the method wants that."""
        whole = self.tiling.tile_elements
        if not self.method.by_row:
            return whole
        unit = row_unit(self.info(tensor))
        return max(1, whole // unit) * unit

    @cached_property
    def _depths(self) -> npt.NDArray[np.float64]:
        return depths(self.table.names)

    def info(self, tensor: int) -> TensorInfo:
        """Return what a method may know of a tensor."""
        return TensorInfo(self.table.names[tensor], self.table.shape(tensor), float(self._depths[tensor]))

    def numbers(self, tensor: int) -> Coefficients:
        """Coefficients of a tensor, where the method is fixed."""
        if isinstance(self.method, Linear):
            return self.method.numbers
        found = self.method.merge(self.info(tensor), None)
        assert isinstance(found, Coefficients)
        return found

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all output shards."""
        return self.layout.file_bytes

    @cached_property
    def parameters(self) -> int:
        """Elements of the float tensors."""
        return int(self.table.elements[_FLOAT[self.out_dtypes]].sum())

    @property
    def projected_peak_bytes(self) -> int:
        """Bytes the engine will own at most, beside `metadata_bytes`."""
        return self.tiling.peak_bytes

    @cached_property
    def metadata_bytes(self) -> int:
        """Bytes of the plan itself and of what is recorded for each ingredient and tensor."""
        tables = {id(c.table): c.table for c in self.checkpoints}
        packed = sum(t.packed_bytes for t in tables.values())
        # Equal names are one object in all tables (49 is sys.getsizeof("")); each tuple of them has its pointers.
        text = sum(len(name) + 49 for name in self.table.names)
        text += 8 * sum(len(names) for names in {id(t.names): t.names for t in tables.values()}.values())
        orders = sum(o.nbytes for o in self.alignment.orders if o is not None)
        digests_and_dtypes = 9 * len(self.checkpoints) * len(self.table)
        return packed + text + orders + digests_and_dtypes + 21 * len(self.table)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what decides the bits of the output, equal for any budget, device and thread count."""
        table = self.table
        digest = hashlib.blake2b(digest_size=16)
        if self.accumulate != "float64":
            digest.update(self.accumulate.encode())
        for array in (
            self.out_dtypes,
            table.dims,
            table.dim_starts,
            self.layout.begins,
            self.layout.shard_of,
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
        if not self.method.fixed:
            digest.update(repr(self.method).encode())
        previous = None
        for position, name in enumerate(table.names):
            digest.update(name.encode() + b"\0")
            if not self.method.fixed:
                continue
            numbers = self.numbers(position)
            if numbers is not previous:  # mostly the same object for every tensor
                digest.update(repr(numbers).encode())
            previous = numbers
        for shard in self.layout.shards:
            digest.update(shard.head)
        return digest.hexdigest()

    def is_averaged(self, tensor: int) -> bool:
        """Whether a tensor is averaged (and not copied)."""
        return bool(self._combined[tensor])

    def out_dtype(self, tensor: int) -> DType:
        """Output dtype of a tensor."""
        return DTYPES[int(self.out_dtypes[tensor])]

    @cached_property
    def in_dtypes(self) -> npt.NDArray[np.uint8]:
        """Dtypes of each tensor in the ingredients, shape (tensors, ingredients)."""
        found = np.empty((len(self.table), len(self.checkpoints)), np.uint8)
        for i, (checkpoint, order) in enumerate(zip(self.checkpoints, self.alignment.orders, strict=True)):
            found[:, i] = checkpoint.table.dtypes if order is None else checkpoint.table.dtypes[order]
        return found

    def in_dtype(self, ingredient: int, tensor: int) -> DType:
        """Dtype of a tensor in one ingredient."""
        return DTYPES[int(self.in_dtypes[tensor, ingredient])]

    @cached_property
    def wide(self) -> npt.NDArray[np.bool_]:
        """Which tensors need double-double sums (float64 in an ingredient or in the output), shape (tensors,)."""
        return _WIDE[self.out_dtypes] | _WIDE[self.in_dtypes].any(axis=1)

    @cached_property
    def bytes_each(self) -> npt.NDArray[np.int64]:
        """Bytes an element of each tensor in all ingredients together, shape (tensors,)."""
        total = np.zeros(len(self.table), np.int64)
        for column in self.in_dtypes.T:
            total += _ITEMSIZE[column]
        return total

    def tiles_of(self, tensor: int, done: Sequence[tuple[int, int]] = ()) -> Iterator[Tile]:
        """Yield the tiles of one tensor, without ranges that are done."""
        step = self.tile_step(tensor)
        for start, stop in _gaps(int(self.table.elements[tensor]), done):
            for first in range(start, stop, step):
                yield Tile(tensor, first, min(step, stop - first))

    def batches(self, done: Mapping[int, Sequence[tuple[int, int]]]) -> Iterator[list[int]]:
        """Yield the averaged tensors that are not done, some at a time: what one sweep read is there for the next."""
        batch: list[int] = []
        held = measured = 0
        for tensor in self.averaged:
            if next(self.tiles_of(tensor, done.get(tensor, ())), None) is None:
                continue
            several = bool(done.get(tensor)) or not self.is_one_tile(tensor)
            if batch and (held + self.bytes_of(tensor) > self.budget_bytes or measured + several > MOST_MEASURED):
                yield batch
                batch, held, measured = [], 0, 0
            batch.append(tensor)
            held += self.bytes_of(tensor)
            measured += several
        if batch:
            yield batch

    def tiles(self, *, averaged: bool, done: Mapping[int, Sequence[tuple[int, int]]] | None = None) -> Iterator[Tile]:
        """Yield tiles by file position, without those ranges that are done.

        Parameters
        ----------
        averaged : bool
            Those of tensors that are averaged, or those of tensors that are copied.
        done : mapping of tensor to sequence of (start, elements), optional
            From a journal; made with any tile size.
        """
        for tensor in np.flatnonzero(self._combined == averaged).tolist():
            yield from self.tiles_of(tensor, (done or {}).get(tensor, ()))


def _gaps(elements: int, done: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    position = 0
    for start, length in sorted(done):
        if start > position:
            yield position, start
        position = max(position, start + length)
    if position < elements:
        yield position, elements
