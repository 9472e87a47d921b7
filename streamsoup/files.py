"""Files of ours, written whole and durably, with the system's errors put into our words."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from streamsoup.errors import DestinationError, DiskSpaceError, ResumeError, StreamsoupError
from streamsoup.units import format_bytes


@contextlib.contextmanager
def writing_to(path: Path | str) -> Iterator[None]:
    """Put errors of the system in the block into words about the file that is written.

    Raises
    ------
    DiskSpaceError, DestinationError
    """
    try:
        yield
    except StreamsoupError:  # some are an OSError, and in our words already
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(f"{path}: the disk is full. Make room, then resume.") from error
        raise DestinationError(f"{path}: cannot be written ({error.strerror}).") from error


def pwrite_all(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all of a buffer at an offset."""
    done = 0
    while done < len(buffer):  # one call moves at most 0x7ffff000 bytes
        done += os.pwrite(fd, buffer[done:], offset + done)


def append_whole(fd: int, raw: bytes, *, durable: bool = True) -> None:
    """Add bytes at the end of a file, all of them or none; if `durable`, wait for the disk."""
    end = os.lseek(fd, 0, os.SEEK_END)
    try:
        pwrite_all(fd, memoryview(raw), end)
        if durable:
            os.fdatasync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, end)  # a torn piece would hide all that comes after it
        raise


def write_durably(path: Path, text: str | bytes) -> None:
    """Write a small file under a temporary name, sync it, and put it in its place."""
    temporary = path.with_name(f".{path.name}.new")
    raw = text if isinstance(text, bytes) else text.encode()
    with writing_to(path):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            pwrite_all(fd, memoryview(raw), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def boot_id() -> str:
    """Tell this start of the machine from every other; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def lock_folder(folder: Path) -> int:
    """Take a folder for this process; closing the descriptor that is returned gives it back.

    Raises
    ------
    ResumeError
        If another process has it, or has just removed it.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ResumeError(f"{folder}: cannot be opened ({error.strerror}).") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(fd), os.stat(folder))
    except OSError:
        held = False
    if not held:
        os.close(fd)
        raise ResumeError(f"{folder}: another process is at work on it. Wait until it ends.")
    return fd


def is_locked(path: Path) -> bool:
    """Whether a process has locked a file; see `streamsoup.journal.Journal`."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(fd)


def require_space_at(needs: Iterable[tuple[Path, int]]) -> None:
    """Check that there is room in several places; what lies on one file system is added up.

    Raises
    ------
    DiskSpaceError
    """
    found: dict[int, tuple[Path, int]] = {}
    for path, nbytes in needs:
        folder = existing_parent(path)
        first, so_far = found.get(device := folder.stat().st_dev, (folder, 0))
        found[device] = first, so_far + nbytes
    for folder, nbytes in found.values():
        require_space(folder, nbytes)


def existing_parent(path: Path) -> Path:
    """Return a folder, or the nearest above it that exists."""
    absolute = Path(os.path.abspath(path))
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def require_space(folder: Path, needed_bytes: int) -> None:
    """Check that a file system has room.

    Raises
    ------
    DiskSpaceError
    """
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < needed_bytes:
        raise DiskSpaceError(
            f"{folder}: {format_bytes(needed_bytes)} are needed, {format_bytes(free)} are free. "
            "Make room or choose another disk."
        )
