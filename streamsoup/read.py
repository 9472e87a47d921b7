"""Bytes in: through maps where the file system is local and the cache warm, by plain reads elsewhere.

Warm, a map is twice as fast as `pread` (no copy). Cold, a map waits for one fault after the other, while plain reads
from several threads keep the disk's queue full, and RWF_DONTCACHE leaves the page cache as it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

from streamsoup.checkpoints import Checkpoint, Shard
from streamsoup.errors import IngredientReadError, RecipeError
from streamsoup.maps import FileMap

MODES = ("auto", "map", "plain")
RWF_DONTCACHE = 0x80  # Linux 6.14; Python has no name for it yet
_OPEN_FILES = 256
_PROBES = 512
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


class Source(Protocol):
    """The bytes of one ingredient."""

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """Return the address of a part of a tensor: in `staging` if that is given, else in memory of the source.

        Parameters
        ----------
        position : int
            Of the tensor in the ingredient's table.
        offset, nbytes : int
            Which part of the tensor.
        staging : writable memoryview, optional
            Where to put the bytes.

        Raises
        ------
        IngredientReadError
        """
        ...

    def close(self) -> None:
        """Give everything back; addresses are invalid afterwards."""
        ...


def choose_mode(checkpoints: Sequence[Checkpoint], mode: str = "auto") -> str:
    """Decide between ``map`` and ``plain``.

    ``auto`` maps what lies on a local file system and is, by a sample of pages, at least half in the page cache.

    Raises
    ------
    RecipeError
        If there is no such mode.
    """
    if mode not in MODES:
        raise RecipeError(f"read mode {mode!r} is not one of {', '.join(MODES)}.")
    if mode != "auto":
        return mode
    shards = [shard for checkpoint in checkpoints for shard in checkpoint.shards]
    if any(_is_network(shard.path) for shard in {os.path.dirname(s.path): s for s in shards}.values()):
        return "plain"
    return "map" if resident_share(shards) >= 0.5 else "plain"


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


class MappedSource:
    """Maps each shard when it is first needed. See `Source`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._table = checkpoint.table
        self._maps: list[FileMap | None] = [None] * len(checkpoint.shards)
        self._lock = threading.Lock()

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        shard = int(self._table.shards[position])
        mapped = self._maps[shard] or self._map(shard)
        address = mapped.address + int(self._table.begins[position]) + offset
        if staging is None:
            return address
        target = ctypes.addressof(ctypes.c_char.from_buffer(staging))
        ctypes.memmove(target, address, nbytes)
        return target

    def _map(self, shard: int) -> FileMap:
        with self._lock:
            mapped = self._maps[shard]
            if mapped is None:
                file = self._checkpoint.shards[shard]
                try:
                    mapped = FileMap(file.path, file.size_bytes)
                except OSError as error:
                    raise _read_error(file, error) from error
                self._maps[shard] = mapped
            return mapped

    def close(self) -> None:
        """See `Source`."""
        for mapped in self._maps:
            if mapped is not None:
                mapped.close()


class PlainSource:
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
            raise _read_error(file, error) from error
        return ctypes.addressof(ctypes.c_char.from_buffer(staging))

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

    def close(self) -> None:
        """See `Source`."""


class OpenFiles:
    """Descriptors that several threads borrow; the ones unused for longest are closed beyond a few hundred."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, list[int]] = OrderedDict()  # path: [descriptor, users]
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def borrow(self, path: str) -> Iterator[int]:
        """Lend the descriptor of a file, opened for reading."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = [os.open(path, os.O_RDONLY), 0]
            self._files.move_to_end(path)
            file[1] += 1
            self._close_idle()
        try:
            yield file[0]
        finally:
            with self._lock:
                file[1] -= 1

    def _close_idle(self) -> None:
        excess = len(self._files) - _OPEN_FILES
        for path in [path for path, (_, users) in self._files.items() if not users][: max(0, excess)]:
            os.close(self._files.pop(path)[0])

    def close(self) -> None:
        """Close all."""
        while self._files:
            os.close(self._files.popitem()[1][0])


def open_source(checkpoint: Checkpoint, mode: str, files: OpenFiles) -> Source:
    """Open the source of one ingredient."""
    return MappedSource(checkpoint) if mode == "map" else PlainSource(checkpoint, files)


@contextlib.contextmanager
def open_sources(checkpoints: Sequence[Checkpoint], mode: str) -> Iterator[list[Source]]:
    """Open one source for each ingredient, in a mode from `choose_mode`, and close them at the end."""
    files = OpenFiles()
    sources = [open_source(checkpoint, mode, files) for checkpoint in checkpoints]
    try:
        yield sources
    finally:
        for source in sources:
            source.close()
        files.close()


def _read_error(shard: Shard, error: OSError) -> IngredientReadError:
    reason = error.strerror or str(error)
    return IngredientReadError(f"{shard.path}: cannot be read ({reason}). Check the file and its disk, then resume.")
