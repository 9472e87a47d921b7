"""A base with a PEFT adapter on it as one ingredient: W + s·B·A, computed as its bytes are read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints.adapter_changes import Changes, Matching, changed_dtypes
from streamsoup.checkpoints.adapter_config import CONFIG_NAME, config_beside, parse_config, read_document
from streamsoup.checkpoints.derived import DerivedCheckpoint, is_computed, out_dtypes_of, scratch_bytes_of
from streamsoup.checkpoints.protocol import Checkpoint, StoredCheckpoint
from streamsoup.checkpoints.table import pack
from streamsoup.errors import CheckpointError
from streamsoup.maps import address_of
from streamsoup.source import STRIP_BYTES, PartReader, Source

_LANES = 32  # `kernels.low_rank.LANES`, repeated so that a plan can be made without a kernel; a test compares them
# Factors are decoded to float64 for so many numbers at a time: what a core keeps in its second-level cache.
_RIGHT_NUMBERS = 1 << 17
_LEFT_NUMBERS = 1 << 15
# As many columns as a panel has, of float64, are a strip.
_HIGHEST_RANK = STRIP_BYTES // (8 * _LANES)


@dataclass(frozen=True)
class AdaptedCheckpoint(DerivedCheckpoint):
    """A base with one adapter on it. See `DerivedCheckpoint`; its parts are base, adapter, configuration.

    Attributes
    ----------
    changes : Changes
    """

    changes: Changes

    def prepare(self) -> None:
        """See `DerivedCheckpoint`."""
        from streamsoup.kernels import low_rank

        super().prepare()
        low_rank.prepare()

    def derive(self, parts: Sequence[PartReader]) -> Source:
        """See `DerivedCheckpoint`."""
        return _AdaptedSource(self, *parts[:2])


def add_adapter(path: str, base: Checkpoint, adapter: Checkpoint) -> AdaptedCheckpoint:
    """Put an adapter on a base.

    Parameters
    ----------
    path : str
        Of both together.
    base, adapter : Checkpoint

    Raises
    ------
    CheckpointError
        If the adapter is none, is of another kind, or does not fit the base.
    """
    if is_computed(adapter):
        raise CheckpointError(
            f"{path}: {adapter.path} has 8-bit floats with scales, which are not understood in adapters. Dequantise it "
            "to bfloat16 first.",
            path=path,
        )
    if (config := config_beside(str(adapter.folder or adapter.path))) is None:
        raise CheckpointError(
            f"{path}: {adapter.path} has no {CONFIG_NAME}, so it is no adapter to put on {base.path}. Name checkpoints "
            "that are averaged one by one, without a plus.",
            path=path,
        )
    document, shard = read_document(config)
    changes = Matching(base, adapter, parse_config(document, str(config))).match()
    ranks = [adapter.table.shape(place)[0] for place in changes.a[changes.a >= 0].tolist()]
    if max(ranks, default=0) > _HIGHEST_RANK:
        raise CheckpointError(
            f"{adapter.path}: rank {max(ranks):,} is above {_HIGHEST_RANK:,}. Merge the adapter with peft first.",
            path=path,
        )
    # What a thread holds of the parts, if they are not read as they lie, it holds beside our own.
    beneath = scratch_bytes_of(base, adapter)
    return AdaptedCheckpoint(
        path=path,
        folder=base.folder,
        # The configuration decides the scales, so it is a part, though nothing is read of it later.
        parts=(base, adapter, StoredCheckpoint(str(config), None, (shard,), pack([], [], [], []), {})),
        table=replace(base.table, dtypes=changed_dtypes(base, adapter, changes)),
        metadata=base.metadata,
        out_dtypes=out_dtypes_of(base),
        scratch_bytes=STRIP_BYTES + 8 * (_RIGHT_NUMBERS + _LEFT_NUMBERS) + beneath,
        changes=changes,
    )


class _Rooms(threading.local):
    """Room for decoded factors that is not in use; it belongs to the thread, since there may be many ingredients."""

    def __init__(self) -> None:
        self.free: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = []


_rooms = _Rooms()


@contextlib.contextmanager
def _room() -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    found = _rooms.free.pop() if _rooms.free else (np.empty(_LEFT_NUMBERS), np.empty(_RIGHT_NUMBERS))
    try:
        yield found
    finally:
        _rooms.free.append(found)


class _AdaptedSource(Source):
    """Computes a tile strip by strip. See `Source`."""

    def __init__(self, checkpoint: AdaptedCheckpoint, base: PartReader, adapter: PartReader) -> None:
        self._checkpoint = checkpoint
        self._changes = checkpoint.changes
        self._base = base
        self._adapter = adapter

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        if self._changes.a[position] < 0:  # without a buffer, too: a running sum has its buffers from here
            part, place = self._whole(position)
            return part.source.fetch(place, offset, nbytes, staging)
        if staging is None:
            raise ValueError("what is computed needs a staging buffer")
        with _room() as room:
            _Sum(self._checkpoint, position, self._base, self._adapter, room).write(offset, nbytes, staging)
        return address_of(staging)

    def _whole(self, position: int) -> tuple[PartReader, int]:
        """Where the weight itself lies."""
        replaced = int(self._changes.replaced[position])
        return (self._base, position) if replaced < 0 else (self._adapter, replaced)

    def load(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        part, place = self._whole(position)
        part.source.load(place, *self._range(position, offset, nbytes))
        table = self._checkpoint.parts[1].table
        for factor in (int(self._changes.a[position]), int(self._changes.b[position])):
            if factor >= 0:  # small beside the weight, and wanted by every tile of it
                elements = int(np.prod(table.shape(factor), dtype=np.int64))
                self._adapter.source.load(factor, 0, table.dtype(factor).nbytes(elements))

    def drop(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        part, place = self._whole(position)
        part.source.drop(place, *self._range(position, offset, nbytes))

    def _range(self, position: int, offset: int, nbytes: int) -> tuple[int, int]:
        """Bytes of the stored weight that these bytes are computed of."""
        itemsize = self._checkpoint.table.dtype(position).itemsize
        stored = _weight_itemsize(self._checkpoint, position)
        return offset // itemsize * stored, nbytes // itemsize * stored

    def close(self) -> None:
        """See `Source`."""
        self._base.source.close()
        self._adapter.source.close()


def _weight_itemsize(checkpoint: AdaptedCheckpoint, position: int) -> int:
    replaced = int(checkpoint.changes.replaced[position])
    base, adapter, _ = checkpoint.parts
    return (base.table.dtype(position) if replaced < 0 else adapter.table.dtype(replaced)).itemsize


class _Sum:
    """W + s·U·V of one tensor: U and V are B and A, or their transposes."""

    def __init__(
        self,
        checkpoint: AdaptedCheckpoint,
        position: int,
        base: PartReader,
        adapter: PartReader,
        room: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    ) -> None:
        changes, (stored, factors, _) = checkpoint.changes, checkpoint.parts
        replaced = int(changes.replaced[position])
        self._weights = (base, position) if replaced < 0 else (adapter, replaced)
        self._weight = stored.table.dtype(position) if replaced < 0 else factors.table.dtype(replaced)
        self._itemsize = checkpoint.table.dtype(position).itemsize
        self._adapter = adapter
        self._left_room, self._right_room = room
        self._transposed = bool(changes.transposed[position])
        self._scale = float(changes.scales[position])
        shape = checkpoint.table.shape(position)
        self._rows, self._columns = shape[0], int(np.prod(shape[1:], dtype=np.int64))
        a, b = int(changes.a[position]), int(changes.b[position])
        self._rank = factors.table.shape(a)[0]
        self._left, self._right = (a, b) if self._transposed else (b, a)
        self._dtypes = {place: factors.table.dtype(place) for place in (a, b)}

    def write(self, offset: int, nbytes: int, staging: memoryview) -> None:
        """Compute a range of bytes, blocks of columns outside and rows inside."""
        begin, end = offset // self._itemsize, (offset + nbytes) // self._itemsize
        if begin == end:
            return
        target = address_of(staging)
        first_row, last_row = begin // self._columns, (end - 1) // self._columns
        first, last = 0, self._columns
        if first_row == last_row:
            first, last = begin - first_row * self._columns, end - first_row * self._columns
        step = max(1, _RIGHT_NUMBERS // (self._rank * _LANES)) * _LANES
        rows = _LEFT_NUMBERS // self._rank
        for column in range(first, last, step):
            block = range(column, min(column + step, last))
            self._decode_right(block)
            for row in range(first_row, last_row + 1, rows):
                some = range(row, min(row + rows, last_row + 1))
                self._decode_left(some)
                start, stop = max(begin, some.start * self._columns), min(end, some.stop * self._columns)
                self._add(start, stop, some.start, block, target + (start - begin) * self._itemsize)

    def _add(self, start: int, stop: int, first_row: int, block: range, target: int) -> None:
        """Write what of a run of elements lies in a block of columns, a strip of the weight at a time."""
        from streamsoup.kernels.low_rank import add_low_rank

        weights, place = self._weights
        size = self._weight.itemsize
        for first in range(start, stop, STRIP_BYTES // size):
            count = min(STRIP_BYTES // size, stop - first)
            row, column = divmod(first, self._columns)
            left = self._left_room.ctypes.data + 8 * (row - first_row) * self._rank
            with weights.view(place, first * size, count * size) as stored:
                add_low_rank(
                    stored.ctypes.data,
                    self._weight.kernel_code,
                    target + (first - start) * self._itemsize,
                    count,
                    column,
                    self._columns,
                    (block.start, block.stop),
                    left,
                    self._right_room.ctypes.data,
                    self._rank,
                    self._scale,
                )

    def _decode_right(self, block: range) -> None:
        """Decode columns of V into panels: (panels, rank, lanes)."""
        rank, lanes = self._rank, _LANES
        if self._transposed:  # V is Bᵀ, and B has a row for each column of V
            pieces = self._pieces(self._right, block.start * rank, len(block) * rank, rank * lanes)
            for start, count, address in pieces:
                panel = start // (rank * lanes)
                shape, steps = (rank, count // rank), (1, rank)
                self._spread(self._right, address, shape, steps, 8 * panel * rank * lanes)
            return
        size = self._dtypes[self._right].itemsize
        if self._columns * size <= STRIP_BYTES // 2:  # whole rows: a call takes as long as 80 kB of them
            for start, count, address in self._pieces(self._right, 0, rank * self._columns, self._columns):
                k, shape = start // self._columns, (count // self._columns, len(block))
                self._spread(self._right, address + block.start * size, shape, (self._columns, 1), 8 * k * lanes)
            return
        for k in range(rank):
            begin = k * self._columns + block.start
            for start, count, address in self._pieces(self._right, begin, len(block), lanes):
                to = 8 * (start * rank + k * lanes)
                self._spread(self._right, address, (1, count), (0, 1), to)

    def _spread(self, place: int, address: int, shape: tuple[int, int], steps: tuple[int, int], to: int) -> None:
        from streamsoup.kernels.low_rank import spread

        target = self._right_room.ctypes.data + to
        spread(address, self._dtypes[place].kernel_code, shape, steps, target, (_LANES, _LANES * self._rank, 1))

    def _decode_left(self, rows: range) -> None:
        """Decode rows of U: (rows, rank)."""
        from streamsoup.kernels.low_rank import spread

        rank, code, room = self._rank, self._dtypes[self._left].kernel_code, self._left_room.ctypes.data
        if not self._transposed:
            for start, count, address in self._pieces(self._left, rows.start * rank, len(rows) * rank, rank):
                spread(address, code, (1, count), (0, 1), room + 8 * start, (0, _LANES, 1))
            return
        for k in range(rank):  # U is Aᵀ
            for start, count, address in self._pieces(self._left, k * self._rows + rows.start, len(rows), 1):
                spread(address, code, (1, count), (0, 1), room + 8 * (start * rank + k), (0, _LANES * rank, rank))

    def _pieces(self, place: int, begin: int, count: int, unit: int) -> Iterator[tuple[int, int, int]]:
        """Lend elements of a factor: where in them each piece starts, how many, and their address."""
        size = self._dtypes[place].itemsize
        step = max(1, STRIP_BYTES // (size * unit)) * unit
        for start in range(0, count, step):
            some = min(step, count - start)
            with self._adapter.view(place, (begin + start) * size, some * size) as stored:
                yield start, some, stored.ctypes.data
