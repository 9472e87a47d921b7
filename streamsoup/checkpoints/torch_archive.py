"""The zip archives that `torch.save` writes: where their entries lie, in a file or in a part of one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

from streamsoup.checkpoints.pickles import MAX_PICKLE_BYTES
from streamsoup.errors import CheckpointError
from streamsoup.maps import FileMap

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_MAX_DIRECTORY_BYTES = 1 << 26
_ENCRYPTED = 0x1
_PROBES = 64


class Archive:
    """What `torch.save` wrote, in a range of an open file.

    Parameters
    ----------
    fd : int
    where : str
        What it is, for messages.
    begin, nbytes : int
        Where it lies in the file.

    Attributes
    ----------
    pickle : bytes
        What was saved; its tensors name entries.

    Raises
    ------
    CheckpointError
    """

    def __init__(self, fd: int, where: str, begin: int, nbytes: int) -> None:
        self._fd = fd
        self._where = where
        self._begin = begin
        self._entries, self._directory = self._list(nbytes)
        roots = [name.removesuffix("data.pkl") for name in self._entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise self._error("is a zip file, but not one that torch.save wrote. Name a checkpoint")
        self._root = roots[0]
        if self._root + "constants.pkl" in self._entries:
            raise self._error("is a TorchScript archive, not a state dict. Save the module's state_dict()")
        if "byteorder" in self and self.read("byteorder", 16) != b"little":
            raise self._error("was written on a big-endian machine. Load and save it on a little-endian one")
        self.pickle = self.read("data.pkl", MAX_PICKLE_BYTES)

    def __contains__(self, name: str) -> bool:
        return self._root + name in self._entries

    def place(self, name: str) -> tuple[int, int]:
        """Return where the bytes of an entry begin in the file, and how many there are.

        Raises
        ------
        CheckpointError
        """
        entry = self._entries[self._root + name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise self._error(
                f"its entry {entry.filename} is compressed or encrypted, so it cannot be read in place. Save it again "
                "with torch.save"
            )
        if not 0 <= entry.header_offset < self._directory:
            raise self._damaged()
        raw = os.pread(self._fd, _LOCAL_HEADER.size, self._begin + entry.header_offset)
        if len(raw) < _LOCAL_HEADER.size or raw[:4] != b"PK\x03\x04":
            raise self._damaged()
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(raw)
        begin = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if entry.file_size != entry.compress_size or begin + entry.file_size > self._directory:
            raise self._damaged()
        return self._begin + begin, entry.file_size

    def read(self, name: str, most: int) -> bytes:
        """Read an entry of at most so many bytes.

        Raises
        ------
        CheckpointError
        """
        begin, nbytes = self.place(name)
        if nbytes > most:
            raise self._error(f"its {name} has {nbytes:,} bytes, more than the {most:,} that are read. Save less in it")
        raw = _pread(self._fd, begin, nbytes)
        if len(raw) < nbytes:
            raise self._damaged()
        return raw

    def _list(self, nbytes: int) -> tuple[dict[str, zipfile.ZipInfo], int]:
        head = os.pread(self._fd, len(_LEGACY), self._begin)
        if head == _LEGACY:
            raise self._error(
                "is in the format from before PyTorch 1.6, which cannot be read in place. Convert it: "
                'torch.save(torch.load("old.pt", weights_only=True), "new.pt")'
            )
        if head[:4] != b"PK\x03\x04":
            raise self._error("is not a file of torch.save (a zip archive). Name a checkpoint")
        try:
            with zipfile.ZipFile(_Range(self._fd, self._begin, nbytes)) as archive:
                found, directory = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, EOFError, OverflowError):
            raise self._damaged() from None
        entries = {entry.filename: entry for entry in found}
        if len(entries) < len(found):
            raise self._error("has two entries of one name. Export or download it again")
        return entries, directory

    def _damaged(self) -> CheckpointError:
        return self._error("is truncated or damaged: its zip directory cannot be followed. Copy or download it again")

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {problem}.", path=self._where)


class _Range(io.RawIOBase):
    """A part of an open file as a file, for `zipfile`."""

    def __init__(self, fd: int, begin: int, nbytes: int) -> None:
        self._fd, self._begin, self._nbytes, self._at = fd, begin, nbytes, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        if at < 0:
            raise ValueError
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._nbytes - self._at)
        count = left if size < 0 else min(size, left)
        if count > _MAX_DIRECTORY_BYTES:
            raise ValueError
        raw = _pread(self._fd, self._begin + self._at, count)
        self._at += len(raw)
        return raw

    def readinto(self, buffer: Any) -> int:
        raw = self.read(len(buffer))
        buffer[: len(raw)] = raw
        return len(raw)


def _pread(fd: int, begin: int, nbytes: int) -> bytes:
    raw = b""
    while len(raw) < nbytes and (piece := os.pread(fd, nbytes - len(raw), begin + len(raw))):
        raw += piece
    return raw


def expect_inside(name: str, path: str, end: int, size_bytes: int) -> None:
    """Refuse a chunk that reaches beyond its file.

    Raises
    ------
    CheckpointError
    """
    if end > size_bytes:
        raise CheckpointError(
            f"{name}: a chunk ends at byte {end:,} of {path}, which has {size_bytes:,}. Copy the file again.",
            path=path,
        )


def digest_of(*things: Any) -> str:
    """Hash bytes and plain values."""
    digest = hashlib.sha256()
    for thing in things:
        raw = thing if isinstance(thing, bytes) else repr(thing).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


@contextlib.contextmanager
def left_cold(fd: int, path: str, size_bytes: int) -> Iterator[None]:
    """Look into a file here and there, and leave nothing of it in the page cache if there was nothing before.

    A page here and there would halve the rate at which the whole file is read later.
    """
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    cold = False
    if size_bytes:
        with contextlib.closing(FileMap(path, size_bytes)) as mapped:
            cold = not any(mapped.resident(k * size_bytes // _PROBES) for k in range(_PROBES))
    try:
        yield
    finally:
        if cold:
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
