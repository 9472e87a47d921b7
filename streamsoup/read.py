"""Bytes in: through maps where the file system is local, by plain reads elsewhere.

Warm, a map is twice as fast as `pread` (no copy). Cold, its pages are read ahead and dropped behind in windows (see
`streamsoup.windows`). On network file systems a map is slow and a lost file a SIGBUS: plain reads go into buffers.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import Checkpoint, DerivedCheckpoint, LiveCheckpoint, Shard, TensorTable
from streamsoup.checkpoints.live import LiveSource
from streamsoup.errors import IngredientReadError, RecipeError
from streamsoup.maps import FileMap, address_of
from streamsoup.open_files import OpenFiles
from streamsoup.source import PartReader, Source
from streamsoup.windows import Windows, window_bytes

_log = logging.getLogger(__name__)
MODES = ("auto", "map", "ahead", "plain", "gds")
RWF_DONTCACHE = 0x80  # Linux 6.14; Python has no name for it yet
_PROBES = 512
_WARM_SHARE = 0.98
_LARGEST_GAP = 1 << 16  # what describes the next tensor; more are tensors that nobody asked for
_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "9p",
    "ceph",
    "lustre",
    "gpfs",
    "beegfs",
    "glusterfs",
    "afs",
    "fuse",
    "virtiofs",
)


def choose_mode(checkpoints: Sequence[Checkpoint], mode: str = "auto") -> str:
    """Decide between ``map``, ``ahead`` (maps, read ahead and dropped behind), ``plain`` and ``gds``.

    ``gds`` reads straight into a GPU's memory; where kvikio is not installed it is ``auto``, with a warning. ``auto``
    maps what lies on a local file system, and reads ahead unless a sample of pages is in the page cache.

    Raises
    ------
    RecipeError
        If there is no such mode.
    """
    if mode not in MODES:
        raise RecipeError(f"read mode {mode!r} is not one of {', '.join(MODES)}.")
    if mode == "gds" and importlib.util.find_spec("kvikio") is None:
        _log.warning("kvikio is not installed: files are read by way of the host's memory.")
    elif mode != "auto":
        return mode
    shards = [shard for checkpoint in checkpoints for shard in checkpoint.shards]
    if any(_is_network(shard.path) for shard in {os.path.dirname(s.path): s for s in shards}.values()):
        return "plain"
    return "map" if resident_share(shards) >= _WARM_SHARE else "ahead"


def resident_share(shards: Sequence[Shard]) -> float:
    """Share of sampled pages that are in the page cache."""
    each = max(2, _PROBES // max(1, len(shards)))
    found = total = 0
    for shard in shards:
        try:
            mapped = FileMap(shard.path, shard.size_bytes)
        except OSError:
            continue  # the reader will say what is wrong with it
        for k in range(each):
            found += mapped.resident((2 * k + 1) * shard.size_bytes // (2 * each))
        total += each
        mapped.close()
    return found / total if total else 1.0


def _is_network(path: str) -> bool:
    import psutil

    real = os.path.realpath(path)
    best, kind = "", ""
    for partition in psutil.disk_partitions(all=True):
        mount = partition.mountpoint.rstrip("/") + "/"
        if real.startswith(mount) and len(mount) >= len(best):
            best, kind = mount, partition.fstype
    return kind.startswith(_NETWORK)


class MappedSource(Source):
    """Maps each shard when it is first needed. See `Source`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._table = checkpoint.table
        self._maps: list[FileMap | None] = [None] * len(checkpoint.shards)
        self._lock = threading.Lock()

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        shard, begin = self._place(position, offset)
        address = self._map(shard).address + begin
        if staging is None:
            return address
        target = address_of(staging)
        ctypes.memmove(target, address, nbytes)
        return target

    def _place(self, position: int, offset: int) -> tuple[int, int]:
        return int(self._table.shards[position]), int(self._table.begins[position]) + offset

    def _map(self, shard: int) -> FileMap:
        mapped = self._maps[shard]
        if mapped is not None:
            return mapped
        with self._lock:
            mapped = self._maps[shard]
            if mapped is None:
                file = self._checkpoint.shards[shard]
                try:
                    mapped = FileMap(file.path, file.size_bytes)
                except OSError as error:
                    raise read_error(file, error) from error
                self._maps[shard] = mapped
            return mapped

    def close(self) -> None:
        """See `Source`."""
        for mapped in self._maps:
            if mapped is not None:
                mapped.close()


class AheadSource(MappedSource):
    """Maps shards, reads their windows ahead and drops them behind. See `Source`."""

    def __init__(self, checkpoint: Checkpoint, files: OpenFiles, window: int) -> None:
        super().__init__(checkpoint)
        self._files = files
        self._window = window
        self._windows: dict[int, Windows] = {}
        self._windows_lock = threading.Lock()
        self._gaps = _gaps_after(checkpoint.table)

    def load(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        shard, begin = self._place(position, offset)
        try:
            self._windows_of(shard).load(begin, nbytes)
        except OSError as error:
            raise read_error(self._checkpoint.shards[shard], error) from error

    def drop(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        shard, begin = self._place(position, offset)
        if self._gaps is not None:
            whole = self._table.dtype(position).nbytes(math.prod(self._table.shape(position)))
            if offset + nbytes == whole:
                nbytes += int(self._gaps[position])
        self._windows_of(shard).drop(begin, nbytes)

    def _windows_of(self, shard: int) -> Windows:
        mapped = self._map(shard)
        with self._windows_lock:
            windows = self._windows.get(shard)
            if windows is None:
                path = self._checkpoint.shards[shard].path
                windows = self._windows[shard] = Windows(mapped, path, self._files, self._window)
            return windows

    def close(self) -> None:
        """See `Source`."""
        for windows in self._windows.values():
            windows.close()
        super().close()


def _gaps_after(table: TensorTable) -> npt.NDArray[np.int32] | None:
    """Count the bytes behind each tensor that belong to none, as in zip files; None if there are nowhere any.

    A window that has some in it would never be used up.
    """
    nbytes = table.nbytes
    order = np.lexsort((table.begins, table.shards))
    order = order[nbytes[order] > 0]  # nobody reads the others
    gaps = np.zeros(len(table), np.int64)
    begins, ends = table.begins[order], (table.begins + nbytes)[order]
    beside = table.shards[order][1:] == table.shards[order][:-1]
    gaps[order[:-1]] = np.where(beside, np.clip(begins[1:] - ends[:-1], 0, _LARGEST_GAP), 0)
    return gaps.astype(np.int32) if gaps.any() else None


class PlainSource(Source):
    """Reads with `preadv` into the caller's buffers and leaves nothing in the page cache that was not there.

    See `Source`; `staging` is required.
    """

    def __init__(self, checkpoint: Checkpoint, files: OpenFiles) -> None:
        self._checkpoint = checkpoint
        self._table = checkpoint.table
        self._files = files
        self._flags = RWF_DONTCACHE

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        if staging is None:
            raise ValueError("plain reads need a staging buffer")
        file = self._checkpoint.shards[int(self._table.shards[position])]
        try:
            with self._files.borrow(file.path) as fd:
                self._read(fd, int(self._table.begins[position]) + offset, staging[:nbytes])
        except OSError as error:
            raise read_error(file, error) from error
        return address_of(staging)

    def _read(self, fd: int, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(fd, [target[done:]], offset + done, self._flags)
            except OSError:
                if not self._flags:
                    raise
                self._flags = 0  # EOPNOTSUPP: an older kernel or another file system
                continue
            if count == 0:
                raise OSError(0, f"ends at byte {offset + done:,}, before the data that its header describes")
            done += count
        if not self._flags:
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, offset, len(target), os.POSIX_FADV_DONTNEED)


def open_source(checkpoint: Checkpoint, mode: str, files: OpenFiles, *, beside: int = 1) -> Source:
    """Open the source of one ingredient, in a mode from `choose_mode`; `beside`: how many are read at once."""
    if isinstance(checkpoint, DerivedCheckpoint):
        return checkpoint.derive(
            [
                PartReader(
                    open_source(part, mode, files, beside=beside * len(checkpoint.parts)),
                    buffered=mode == "plain" or isinstance(part, DerivedCheckpoint),
                )
                for part in checkpoint.parts
            ]
        )
    if isinstance(checkpoint, LiveCheckpoint):
        return LiveSource(checkpoint)
    if mode == "map":
        return MappedSource(checkpoint)
    if mode == "gds":
        from streamsoup.storage import StorageSource

        return StorageSource(checkpoint)
    if mode == "ahead":
        return AheadSource(checkpoint, files, window_bytes(beside))
    return PlainSource(checkpoint, files)


@contextlib.contextmanager
def open_sources(checkpoints: Sequence[Checkpoint], mode: str) -> Iterator[list[Source]]:
    """Open one source for each ingredient, in a mode from `choose_mode`, and close them at the end."""
    files = OpenFiles()
    sources = [open_source(checkpoint, mode, files, beside=len(checkpoints)) for checkpoint in checkpoints]
    try:
        yield sources
    finally:
        for source in sources:
            source.close()
        files.close()


def read_error(shard: Shard, error: OSError) -> IngredientReadError:
    """Put an error of the system into words about the file that was read."""
    reason = error.strerror or str(error)
    return IngredientReadError(f"{shard.path}: cannot be read ({reason}). Check the file and its disk, then resume.")
