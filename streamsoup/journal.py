"""What has been done, so that a run that died can go on.

A journal is a file of frames: length, CRC-32, payload. A frame is appended only after the bytes that it speaks of are
durable, so what a journal says is true even after a power cut; a torn last frame is ignored.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from streamsoup.files import append_whole, writing_to

_FRAME = struct.Struct("<II")


@dataclass(frozen=True)
class TileRecord:
    """One finished tile.

    Attributes
    ----------
    tensor, start, elements : int
    digests : uint64 array, shape (ingredients,)
        Of the tile's bytes in each ingredient.
    nonfinite : int64 array, shape (ingredients,), or None
        NaN and infinite elements; None where there are none.
    overflowed : int
        Elements too large for the output dtype.
    differs : bool array, shape (ingredients,), or None
        For copied tensors: which ingredients differ from the first.
    """

    tensor: int
    start: int
    elements: int
    digests: npt.NDArray[np.uint64]
    nonfinite: npt.NDArray[np.int64] | None = None
    overflowed: int = 0
    differs: npt.NDArray[np.bool_] | None = None


class Journal:
    """Appends finished tiles to a file. Whoever has the workspace has the journal.

    Parameters
    ----------
    path : Path
    durable : bool
        Wait for the disk at each append.
    locked : bool
        Say to others, as long as it is open, that somebody appends.
    """

    def __init__(self, path: Path, *, durable: bool = True, locked: bool = False) -> None:
        self._path = path
        self._durable = durable
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if locked:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def read(self) -> Iterator[TileRecord]:
        """Yield all records, one frame in memory at a time; a torn tail is cut off when its place is reached."""
        position = 0
        while len(head := os.pread(self._fd, _FRAME.size, position)) == _FRAME.size:
            length, checksum = _FRAME.unpack(head)
            size = os.fstat(self._fd).st_size
            # A power cut may leave zeros, and the checksum of nothing is zero.
            whole = 0 < length <= size - position - _FRAME.size
            payload = os.pread(self._fd, length, position + _FRAME.size) if whole else b""
            if not whole or len(payload) < length or zlib.crc32(payload) != checksum:
                break
            yield from _decode(payload)
            position += _FRAME.size + length
        os.ftruncate(self._fd, position)

    def append(self, records: Sequence[TileRecord]) -> None:
        """Add records; if they are to be durable, what they speak of must be durable already."""
        if not records:
            return
        payload = _encode(records)
        frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        with writing_to(self._path):
            append_whole(self._fd, frame, durable=self._durable)

    def close(self) -> None:
        """Release the file."""
        os.close(self._fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journals(paths: Iterable[Path]) -> Iterator[TileRecord]:
    """Yield the records of several journals, one frame in memory at a time."""
    for path in paths:
        with Journal(path) as journal:
            yield from journal.read()


def _encode(records: Sequence[TileRecord]) -> bytes:
    count = len(records[0].digests)
    none = np.zeros(count, np.int64)
    file = io.BytesIO()
    np.savez(
        file,
        place=np.array([(r.tensor, r.start, r.elements, r.overflowed) for r in records], np.int64),
        digests=np.stack([r.digests for r in records]),
        nonfinite=_sparse([none if r.nonfinite is None else r.nonfinite for r in records]),
        differs=_sparse([none if r.differs is None else r.differs.astype(np.int64) for r in records]),
    )
    return file.getvalue()


def _decode(payload: bytes) -> list[TileRecord]:
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        place, digests = arrays["place"], arrays["digests"]
        nonfinite, differs = (_dense(arrays[name], digests.shape[1]) for name in ("nonfinite", "differs"))
    return [
        TileRecord(
            tensor,
            start,
            elements,
            digests=digests[i],
            nonfinite=nonfinite.get(i),
            overflowed=overflowed,
            differs=differs[i].astype(np.bool_) if i in differs else None,
        )
        for i, (tensor, start, elements, overflowed) in enumerate(place.tolist())
    ]


def _sparse(rows: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Triples (row, column, value) of what is not zero: mostly nothing."""
    return np.array([(i, j, row[j]) for i, row in enumerate(rows) for j in np.flatnonzero(row)], np.int64).reshape(
        -1, 3
    )


def _dense(triples: npt.NDArray[np.int64], columns: int) -> dict[int, npt.NDArray[np.int64]]:
    rows: dict[int, npt.NDArray[np.int64]] = {}
    for i, j, value in triples.tolist():
        rows.setdefault(i, np.zeros(columns, np.int64))[j] = value
    return rows
