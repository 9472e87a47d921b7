"""Read-only shared maps of whole files, by address.

Python's `mmap` keeps a duplicate of the file descriptor for each map, so a hundred ingredients of thirty shards would
need 3,000 of them; the C library's does not. Nothing is ever written through a map: a full disk would be a SIGBUS.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

_MAP_FAILED = ctypes.c_void_p(-1).value
_PAGE = mmap.PAGESIZE


@functools.cache
def libc() -> Any:
    """Return the C library with the argument types of what we call set; its calls release the GIL."""
    library = ctypes.CDLL(None, use_errno=True)
    size, pointer, integer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    library.mmap.argtypes = [pointer, size, integer, integer, integer, ctypes.c_int64]
    library.mmap.restype = pointer
    library.munmap.argtypes = [pointer, size]
    library.madvise.argtypes = [pointer, size, integer]
    library.mincore.argtypes = [pointer, size, ctypes.POINTER(ctypes.c_ubyte)]
    return library


def bytes_at(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """View raw memory, shape (nbytes,); valid as long as what lies there."""
    return np.frombuffer(memoryview((ctypes.c_ubyte * nbytes).from_address(address)), np.uint8)


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
            found = os.fstat(fd).st_size
            if found != size_bytes:
                raise OSError(0, f"{found:,} bytes, expected {size_bytes:,}", path)
            address = libc().mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
            if address == _MAP_FAILED:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), path)
            self.address = address
        finally:
            os.close(fd)

    def resident(self, offset: int) -> bool:
        """Whether the page of a byte is in the page cache (true where the system does not tell)."""
        page = ctypes.c_ubyte()
        start = self.address + offset // _PAGE * _PAGE
        failed = libc().mincore(start, 1, ctypes.byref(page))
        return bool(failed) or bool(page.value & 1)

    def close(self) -> None:
        """Unmap; addresses into the map are invalid afterwards."""
        if self.address:
            libc().munmap(self.address, self.size_bytes)
            self.address = 0
