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
from collections.abc import Sequence
from types import TracebackType
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


class Reader(Protocol):
    """Brings bytes of ingredients into reach."""

    def fetch(self, ingredient: int, shard: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """Return the address of the bytes: in `staging` if that is given, else in a map.

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


class MappedReader:
    """Maps each shard when it is first needed."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._maps: list[list[FileMap | None]] = [[None] * len(c.shards) for c in checkpoints]
        self._lock = threading.Lock()

    def fetch(self, ingredient: int, shard: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Reader`."""
        mapped = self._maps[ingredient][shard] or self._map(ingredient, shard)
        address = mapped.address + offset
        if staging is None:
            return address
        target = ctypes.addressof(ctypes.c_char.from_buffer(staging))
        ctypes.memmove(target, address, nbytes)
        return target

    def _map(self, ingredient: int, shard: int) -> FileMap:
        with self._lock:
            mapped = self._maps[ingredient][shard]
            if mapped is None:
                file = self._checkpoints[ingredient].shards[shard]
                try:
                    mapped = FileMap(file.path, file.size_bytes)
                except OSError as error:
                    raise _read_error(file, error) from error
                self._maps[ingredient][shard] = mapped
            return mapped

    def close(self) -> None:
        """See `Reader`."""
        for maps in self._maps:
            for mapped in maps:
                if mapped is not None:
                    mapped.close()

    def __enter__(self) -> MappedReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PlainReader:
    """Reads with `preadv` into the caller's buffers and leaves nothing in the page cache that was not there."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._files: OrderedDict[tuple[int, int], _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._flags = RWF_DONTCACHE

    def fetch(self, ingredient: int, shard: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Reader`; `staging` is required."""
        if staging is None:
            raise ValueError("plain reads need a staging buffer")
        file = self._checkpoints[ingredient].shards[shard]
        with self._borrow(ingredient, shard) as fd:
            try:
                self._read(fd, offset, staging[:nbytes])
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

    @contextlib.contextmanager
    def _borrow(self, ingredient: int, shard: int):  # type: ignore[no-untyped-def]
        key = (ingredient, shard)
        with self._lock:
            file = self._files.get(key)
            if file is None:
                path = self._checkpoints[ingredient].shards[shard].path
                try:
                    file = _OpenFile(os.open(path, os.O_RDONLY))
                except OSError as error:
                    raise _read_error(self._checkpoints[ingredient].shards[shard], error) from error
                self._files[key] = file
                self._close_idle()
            self._files.move_to_end(key)
            file.users += 1
        try:
            yield file.fd
        finally:
            with self._lock:
                file.users -= 1

    def _close_idle(self) -> None:
        idle = [key for key, file in self._files.items() if not file.users]
        for key in idle[: max(0, len(self._files) - _OPEN_FILES)]:
            os.close(self._files.pop(key).fd)

    def close(self) -> None:
        """See `Reader`."""
        while self._files:
            os.close(self._files.popitem()[1].fd)

    def __enter__(self) -> PlainReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _OpenFile:
    __slots__ = ("fd", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0


def open_reader(checkpoints: Sequence[Checkpoint], mode: str) -> MappedReader | PlainReader:
    """Make the reader for a mode from `choose_mode`."""
    return MappedReader(checkpoints) if mode == "map" else PlainReader(checkpoints)


def _read_error(shard: Shard, error: OSError) -> IngredientReadError:
    reason = error.strerror or str(error)
    return IngredientReadError(f"{shard.path}: cannot be read ({reason}). Check the file and its disk, then resume.")
