"""Descriptors of files that are read again and again."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator

_MOST = 256


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
        excess = len(self._files) - _MOST
        for path in [path for path, (_, users) in self._files.items() if not users][: max(0, excess)]:
            os.close(self._files.pop(path)[0])

    def close(self) -> None:
        """Close all."""
        while self._files:
            os.close(self._files.popitem()[1][0])
