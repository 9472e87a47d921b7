"""Read-only shared maps of whole files, by address.

Python's `mmap` keeps a duplicate of the file descriptor for each map, so a hundred ingredients of thirty shards would
need 3,000 of them; the C library's does not. Nothing is ever written through a map: a full disk would be a SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

_RESIDENT_STEP = 1 << 30
_MAP_FAILED = ctypes.c_void_p(-1).value
PAGE_BYTES = mmap.PAGESIZE
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it yet


@functools.cache
def libc() -> Any:
    """Return the C library with the argument types of what we call set; its calls release the GIL."""
    library = ctypes.CDLL(None, use_errno=True)
    size, pointer, integer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    library.mmap.argtypes = [pointer, size, integer, integer, integer, ctypes.c_int64]
    library.mmap.restype = pointer
    library.munmap.argtypes = [pointer, size]
    library.memcmp.argtypes = [pointer, pointer, size]
    library.madvise.argtypes = [pointer, size, integer]
    library.mincore.argtypes = [pointer, size, ctypes.POINTER(ctypes.c_ubyte)]
    return library


def bytes_at(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """View raw memory, shape (nbytes,); valid as long as what lies there."""
    return np.frombuffer(memoryview((ctypes.c_ubyte * nbytes).from_address(address)), np.uint8)


def address_of(buffer: memoryview) -> int:
    """Address of the first byte of a writable buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def same_bytes(buffer: memoryview, address: int) -> bool:
    """Whether memory at an address holds what a writable buffer holds; without a temporary of its size."""
    return bool(libc().memcmp(address_of(buffer), address, len(buffer)) == 0)


class FileMap:
    """One mapped file.

    Parameters
    ----------
    path : str
    size_bytes : int
        Expected size of the file.

    Attributes
    ----------
    address : int
        Of the first byte; valid until `close`.

    Raises
    ------
    OSError
        If it cannot be opened or mapped, or has another size.
    """

    def __init__(self, path: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.address = 0
        fd = os.open(path, os.O_RDONLY)
        try:
            stat = os.fstat(fd)
            if stat.st_size != size_bytes:
                raise OSError(0, f"{stat.st_size:,} bytes, expected {size_bytes:,}", path)
            # Of files that one may only read, the system says that all is cached.
            self._tells = os.geteuid() in (0, stat.st_uid) or os.access(path, os.W_OK)
            address = libc().mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
            if address == _MAP_FAILED:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), path)
            self.address = address
        finally:
            os.close(fd)

    def resident(self, offset: int) -> bool:
        """Whether the page of a byte is in the page cache; false where the system does not tell."""
        page = ctypes.c_ubyte()
        start = self.address + offset // PAGE_BYTES * PAGE_BYTES
        failed = libc().mincore(start, 1, ctypes.byref(page))
        return self._tells and not failed and bool(page.value & 1)

    def resident_shares(self, size: int) -> npt.NDArray[np.float64]:
        """Share of the pages of each `size` bytes that are in the page cache; none where the system does not tell."""
        shares = np.zeros(-(-self.size_bytes // size))
        if not self._tells:
            return shares
        step = _RESIDENT_STEP // size
        for first in range(0, len(shares), step):
            begin = first * size
            nbytes = min(step * size, self.size_bytes - begin)
            pages = np.empty(-(-nbytes // PAGE_BYTES), np.uint8)
            vector = pages.ctypes.data_as(ctypes.POINTER(ctypes.c_ubyte))
            if libc().mincore(self.address + begin, nbytes, vector):
                return np.zeros(len(shares))
            starts = np.arange(0, len(pages), size // PAGE_BYTES)
            counts = np.diff(np.append(starts, len(pages)))
            shares[first : first + step] = np.add.reduceat((pages & 1).astype(np.int64), starts) / counts
        return shares

    def prefer_huge_pages(self) -> None:
        """Have cold pages read and mapped 2 MiB at a time. Advice: where it is not taken, nothing is lost."""
        libc().madvise(self.address, self.size_bytes, _MADV_HUGEPAGE)

    def populate(self, offset: int, nbytes: int) -> None:
        """Bring pages from a page boundary on into the page cache and into the map.

        Raises
        ------
        OSError
            Where reading through the map would be a SIGBUS.
        """
        if libc().madvise(self.address + offset, nbytes, _MADV_POPULATE_READ):
            error = ctypes.get_errno()
            if error != errno.EINVAL:  # an older kernel: the first touch reads
                raise OSError(error, "the disk failed, or the file was cut short")

    def unmap_pages(self, offset: int, nbytes: int) -> None:
        """Take pages from a page boundary on out of the map, so that the page cache may drop them."""
        libc().madvise(self.address + offset, nbytes, _MADV_DONTNEED)

    def close(self) -> None:
        """Unmap; addresses into the map are invalid afterwards."""
        if self.address:
            libc().munmap(self.address, self.size_bytes)
            self.address = 0
