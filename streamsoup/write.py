"""Bytes out: files of their final size, reserved before the first byte, written at known offsets, synced."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from streamsoup.errors import DestinationError
from streamsoup.files import pwrite_all, writing_to
from streamsoup.layout import Layout
from streamsoup.maps import libc

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


class Sink(Protocol):
    """Where finished tiles go. Inherit from it: only `write` has no default."""

    def room(self, tensor: int, offset: int, nbytes: int) -> memoryview | None:
        """Return writable memory of its own for a tile, to be filled instead of calling `write`; or None.

        After a failure, what is in it is undefined.
        """
        return None

    def resident(self, tensor: int, offset: int, nbytes: int, device: Any) -> Any | None:
        """Return memory of a device for a tile, to be filled instead of calling `write`: a uint8 tensor; or None."""
        return None

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """Take the bytes of a tile: `offset` counts from the tensor's first byte. Called from several threads."""
        ...

    def sync(self) -> None:
        """Wait until all that was written is durable."""
        return


class FileSink(Sink):
    """Writes tiles into the shards of a layout.

    Parameters
    ----------
    folder : Path
        Where the shards lie; must exist.
    layout : Layout
    existing : bool
        Go on with shards that an earlier run reserved.
    durable : bool
        Sync what is written; not needed for a candidate that will be overwritten.

    Raises
    ------
    DiskSpaceError, DestinationError
    """

    def __init__(self, folder: Path, layout: Layout, *, existing: bool = False, durable: bool = True) -> None:
        self._layout = layout
        self._shard_of = layout.shard_of
        self._begins = layout.begins
        self._durable = durable
        self._fds: list[int] = []
        self._written: set[int] = set()  # shards with bytes that are not synced yet
        self._lock = threading.Lock()
        try:
            for shard in layout.shards:
                with writing_to(folder / shard.name):
                    fd = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT, 0o666)
                    self._fds.append(fd)
                    self._written.add(len(self._fds) - 1)
                    if not existing or os.fstat(fd).st_size != shard.file_bytes:
                        os.ftruncate(fd, min(os.fstat(fd).st_size, shard.file_bytes))
                        os.posix_fallocate(fd, 0, shard.file_bytes)
                        pwrite_all(fd, memoryview(shard.head), 0)
        except BaseException:
            self.close()
            raise

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """See `Sink`."""
        shard = int(self._shard_of[tensor])
        with writing_to(self._layout.shards[shard].name):
            pwrite_all(self._fds[shard], buffer, int(self._begins[tensor]) + offset)
        with self._lock:
            self._written.add(shard)

    def sync(self) -> None:
        """See `Sink`."""
        with self._lock:
            written, self._written = self._written, set()
        for shard in sorted(written) if self._durable else ():
            with writing_to(self._layout.shards[shard].name):
                os.fsync(self._fds[shard])

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> FileSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def move_file(source: Path, destination: Path, *, overwrite: bool) -> None:
    """Rename a finished file to its destination, atomically.

    Raises
    ------
    DestinationError
        If the destination exists and may not be overwritten.
    """
    if overwrite:
        with writing_to(destination):
            os.replace(source, destination)
    else:
        _move_new(source, destination)


def move_folder(source: Path, destination: Path, *, overwrite: bool) -> Path | None:
    """Rename a finished folder to its destination, atomically.

    With `overwrite`, source and destination are exchanged; the old one is then where the source was. Where the system
    cannot exchange, the old one is first renamed beside it, and is there until the new one is in place.

    Returns
    -------
    Path or None
        Where the old folder is now.

    Raises
    ------
    DestinationError
        If the destination exists and may not be overwritten.
    """
    if not overwrite or not os.path.lexists(destination):
        _move_new(source, destination)
        return None
    if _renameat2(source, destination, _RENAME_EXCHANGE):
        return source
    aside = destination.with_name(f"{destination.name}.old-{os.getpid()}")
    with writing_to(destination):
        os.rename(destination, aside)
        try:
            os.rename(source, destination)
        except OSError:
            os.rename(aside, destination)
            raise
    return aside


def _move_new(source: Path, destination: Path) -> None:
    if _renameat2(source, destination, _RENAME_NOREPLACE):
        return
    if os.path.lexists(destination):
        raise DestinationError(f"{destination}: appeared while the soup was made. Move it away, then resume.")
    with writing_to(destination):
        os.rename(source, destination)


def _renameat2(source: Path, destination: Path, flags: int) -> bool:
    try:
        function = libc().renameat2
    except AttributeError:
        return False
    return bool(function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(destination), flags) == 0)
