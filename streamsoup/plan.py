"""From ingredients, a method and a budget to a plan: pure functions that read nothing but headers.

Executing a plan cannot discover a missing tensor, an unequal shape or a file that does not fit: all that is
refused here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from streamsoup.align import Alignment, align
from streamsoup.checkpoints import Checkpoint, TensorTable
from streamsoup.dtypes import DTYPES, DType, parse_float_dtype
from streamsoup.errors import RecipeError
from streamsoup.layout import Layout, lay_out
from streamsoup.methods import Method
from streamsoup.recipe import DEFAULT_SHARD_BYTES
from streamsoup.tiling import TileNeeds, Tiling, choose_tiling

_WIDE = np.array([d.is_wide for d in DTYPES])
_WIDE_LEAST = 2.0**-400
_FLOAT = np.array([d.is_float for d in DTYPES])
_ITEMSIZE = np.array([d.itemsize for d in DTYPES], np.int64)


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

    @property
    def table(self) -> TensorTable:
        """Names and shapes of the soup's tensors."""
        return self.alignment.table

    @cached_property
    def bytes_to_read(self) -> int:
        """Bytes of all tensors of all ingredients: each is read once."""
        return sum(int(c.table.nbytes.sum()) for c in self.checkpoints)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all output shards."""
        return self.layout.file_bytes

    @cached_property
    def parameters(self) -> int:
        """Elements of the tensors that are averaged."""
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
        for array in (
            self.out_dtypes,
            table.dims,
            table.dim_starts,
            self.layout.begins,
            self.layout.shard_of,
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
        previous = None
        for name in table.names:
            numbers = self.method.coefficients(name)
            digest.update(name.encode() + b"\0")
            if numbers is not previous:  # fixed numbers are the same object for every tensor
                digest.update(repr(numbers).encode())
            previous = numbers
        for shard in self.layout.shards:
            digest.update(shard.head)
        return digest.hexdigest()

    def is_averaged(self, tensor: int) -> bool:
        """Whether a tensor is averaged (and not copied)."""
        return bool(_FLOAT[self.out_dtypes[tensor]])

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
        for start, stop in _gaps(int(self.table.elements[tensor]), done):
            for first in range(start, stop, self.tiling.tile_elements):
                yield Tile(tensor, first, min(self.tiling.tile_elements, stop - first))

    def tiles(self, *, averaged: bool, done: Mapping[int, Sequence[tuple[int, int]]] | None = None) -> Iterator[Tile]:
        """Yield tiles by file position, without those ranges that are done.

        Parameters
        ----------
        averaged : bool
            Those of tensors that are averaged, or those of tensors that are copied.
        done : mapping of tensor to sequence of (start, elements), optional
            From a journal; made with any tile size.
        """
        for tensor in np.flatnonzero(_FLOAT[self.out_dtypes] == averaged).tolist():
            yield from self.tiles_of(tensor, (done or {}).get(tensor, ()))


def tensor_bytes(checkpoints: Sequence[Checkpoint]) -> float:
    """Bytes of an average tensor, in all of these checkpoints together."""
    table = checkpoints[0].table
    sizes = sum(float(_ITEMSIZE[c.table.dtypes].mean()) if len(c.table) else 0.0 for c in checkpoints)
    return sizes * float(table.elements.mean()) if len(table) else 0.0


def _refuse_extreme(method: Method, checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> None:
    """Refuse what double-double arithmetic, which scales large numbers, was not proved for."""
    previous = None
    for name in names:
        numbers = method.coefficients(name)
        if numbers is previous:  # fixed numbers are the same object for every tensor
            continue
        previous = numbers
        for number, where in [
            *((w, c.path) for w, c in zip(numbers.weights, checkpoints, strict=True)),
            (numbers.divisor[0], "their sum"),
        ]:
            if number and not _WIDE_LEAST <= abs(number) <= 1 / _WIDE_LEAST:
                raise RecipeError(
                    f"{where}: weight {number:g}; with float64 tensors they lie between 2^-400 and 2^400. Scale them."
                )


def _gaps(elements: int, done: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    position = 0
    for start, length in sorted(done):
        if start > position:
            yield position, start
        position = max(position, start + length)
    if position < elements:
        yield position, elements


def make_plan(
    checkpoints: Sequence[Checkpoint],
    method: Method,
    *,
    dtype: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    file_name: str | None = None,
    out_dtypes: npt.NDArray[np.uint8] | None = None,
    layout: Layout | None = None,
    budget_bytes: int,
    workers: int,
    staged: bool,
    ahead: bool = False,
    reserved_bytes: int = 0,
    buffer_itemsize: int = 0,
) -> Plan:
    """Plan a soup.

    Parameters
    ----------
    checkpoints : sequence of Checkpoint
        The first gives names, order and (unless `dtype` is given) output dtypes.
    method : Method
    dtype : str, optional
        Float dtype of the output.
    shard_bytes : int
        Largest output shard.
    file_name : str, optional
        Write a single file of this name.
    out_dtypes : uint8 array, shape (tensors,), optional
        Output dtypes, instead of the first checkpoint's and `dtype`.
    layout : Layout, optional
        Of an earlier plan, instead of a new one.
    budget_bytes : int
        What the engine may own.
    workers : int
        Most threads.
    staged : bool
        Whether ingredients are read into buffers.
    ahead : bool
        Whether what is mapped is read ahead.
    reserved_bytes : int
        What of the budget is taken already.
    buffer_itemsize : int
        See `TileNeeds`; not needed where ingredients are read into buffers anyway.

    Raises
    ------
    MismatchError, BudgetError

    Notes
    -----
    Memory: packed arrays, at most 64 bytes an ingredient and tensor.
    """
    alignment = align(checkpoints)
    table = alignment.table
    if out_dtypes is None:
        out_dtypes = table.dtypes.copy()
        if dtype is not None:
            out_dtypes[_FLOAT[out_dtypes]] = parse_float_dtype(dtype).index
    if layout is None:
        metadata = {**checkpoints[0].metadata, "format": "pt"}
        layout = lay_out(table, out_dtypes, shard_bytes=shard_bytes, metadata=metadata, file_name=file_name)
    in_dtypes = {i for c in checkpoints for i in set(c.table.dtypes.tolist())}
    wide = any(DTYPES[i].is_wide for i in in_dtypes.union(out_dtypes.tolist()))
    if wide:
        _refuse_extreme(method, checkpoints, table.names)
    needs = TileNeeds(
        ingredients=len(checkpoints),
        in_itemsize=int(_ITEMSIZE[list(in_dtypes)].max(initial=1)),
        out_itemsize=int(_ITEMSIZE[out_dtypes].max(initial=1)),
        staged=staged,
        ahead=ahead,
        reserved_bytes=reserved_bytes,
        buffer_itemsize=0 if staged else buffer_itemsize,
        largest_elements=int(table.elements.max(initial=0)),
        groupable=not wide,
    )
    tiling = choose_tiling(needs, budget_bytes=budget_bytes, workers=workers)
    return Plan(tuple(checkpoints), method, alignment, out_dtypes, layout, needs, budget_bytes, tiling, staged, ahead)
