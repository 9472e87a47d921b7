"""Mapped files whose bytes are read ahead and dropped behind, window by window.

Windows lie at multiples of their size in the file, whatever tensors begin where: the page cache then reads and drops
whole large folios, which is two to three times faster from a cold disk than the same reads shifted by a few kB. What is
in a window that was cached before stays cached. Whether a window was loaded is a matter of speed alone: a map is right
at any time.
"""

from __future__ import annotations

import contextlib
import os
import threading

import numpy as np

from streamsoup.maps import FileMap
from streamsoup.open_files import OpenFiles

LARGEST_WINDOW = 2 << 20
SMALLEST_WINDOW = 128 << 10
# Of all ingredients together, twice: the windows that a tile lies in, and the next ones.
_WINDOWS_BYTES = 512 << 20
_CACHED_SHARE = 0.5
_UNSEEN, _NOT_OURS = -1, -2


def window_bytes(files: int) -> int:
    """Choose the size of windows where this many files are read at once."""
    size = LARGEST_WINDOW
    while size > SMALLEST_WINDOW and 2 * size * files > _WINDOWS_BYTES:
        size //= 2
    return size


class Windows:
    """The windows of one mapped file.

    Parameters
    ----------
    mapped : FileMap
    path : str
        Of the same file.
    files : OpenFiles
    size : int
        Bytes of a window.
    """

    def __init__(self, mapped: FileMap, path: str, files: OpenFiles, size: int) -> None:
        self._mapped = mapped
        self._path = path
        self._files = files
        self._size = size
        self._lock = threading.Lock()
        if size == LARGEST_WINDOW:  # smaller windows would be parts of huge pages, and a part is never dropped
            mapped.prefer_huge_pages()
        # Bytes of each window that are still to be used, once it was loaded. What is cached is asked once, before
        # anything is loaded: later the kernel's own read-ahead would be taken for it.
        cached = mapped.resident_shares(size) >= _CACHED_SHARE
        self._left = np.where(cached, _NOT_OURS, _UNSEEN).astype(np.int32)

    def load(self, offset: int, nbytes: int) -> None:
        """Bring the windows of a range into the page cache, those that were not brought before.

        Raises
        ------
        OSError
        """
        for window in self._of(offset, nbytes):
            with self._lock:
                if self._left[window] != _UNSEEN:
                    continue
                self._left[window] = self._nbytes(window)
            self._mapped.populate(window * self._size, self._nbytes(window))

    def drop(self, offset: int, nbytes: int) -> None:
        """Note that a range will not be used again, and drop the windows that are used up."""
        end = offset + nbytes
        for window in self._of(offset, nbytes):
            begin = window * self._size
            used = min(end, begin + self._size) - max(offset, begin)
            with self._lock:
                if self._left[window] <= 0:
                    continue
                self._left[window] -= used
                used_up = self._left[window] <= 0
                if used_up:
                    self._left[window] = _UNSEEN  # another sweep may want it again
            if used_up:
                self._drop(window)

    def close(self) -> None:
        """Drop what was loaded and not used up: headers, tensors of other passes."""
        for window in np.flatnonzero(self._left > 0).tolist():
            self._drop(window)

    def _drop(self, window: int) -> None:
        begin, length = window * self._size, self._nbytes(window)
        self._mapped.unmap_pages(begin, length)
        with contextlib.suppress(OSError), self._files.borrow(self._path) as fd:
            os.posix_fadvise(fd, begin, length, os.POSIX_FADV_DONTNEED)

    def _of(self, offset: int, nbytes: int) -> range:
        return range(offset // self._size, -(-(offset + nbytes) // self._size))

    def _nbytes(self, window: int) -> int:
        return min(self._size, self._mapped.size_bytes - window * self._size)
