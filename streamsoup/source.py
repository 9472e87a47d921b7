"""The bytes of one ingredient, wherever they come from: what readers of files and computed tensors have in common."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streamsoup.maps import bytes_at

# What is computed of stored bytes looks at so many of them at a time.
STRIP_BYTES = 1 << 18


class Source(Protocol):
    """The bytes of one ingredient. Inherit from it: only `fetch` has no default.

    Attributes
    ----------
    delivers : bool
        Whether bytes can be put into the memory of a device without the host's.
    """

    delivers: bool = False

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

    def resident(self, position: int, offset: int, nbytes: int, device: Any) -> Any | None:
        """Return a part of a tensor where it lies in the memory of a device: a uint8 tensor; None: it does not."""
        return None

    def deliver(self, position: int, offset: int, nbytes: int, target: Any) -> None:
        """Put a part of a tensor into memory of a device, a uint8 tensor; where the source `delivers`.

        Raises
        ------
        IngredientReadError
        """
        return

    def load(self, position: int, offset: int, nbytes: int) -> None:
        """Read a part of a tensor that will soon be fetched, if that helps.

        Raises
        ------
        IngredientReadError
        """
        return

    def drop(self, position: int, offset: int, nbytes: int) -> None:
        """Take note that a part of a tensor will not be fetched again."""
        return

    def close(self) -> None:
        """Give everything back; addresses are invalid afterwards."""
        return


class _Strips(threading.local):
    """Buffers of a thread that are not in use."""

    def __init__(self) -> None:
        self.free: list[npt.NDArray[np.uint8]] = []


_strips = _Strips()


class PartReader:
    """The bytes of one part of a `DerivedCheckpoint`, a strip at a time.

    Parameters
    ----------
    source : Source
    buffered : bool
        Whether the source needs a buffer to put bytes into.

    Attributes
    ----------
    most_bytes : int
        What can be viewed at once: a strip, or anything where no buffer is needed.
    """

    def __init__(self, source: Source, *, buffered: bool) -> None:
        self.source = source
        self._buffered = buffered
        self.most_bytes = STRIP_BYTES if buffered else sys.maxsize

    @contextlib.contextmanager
    def view(self, position: int, offset: int, nbytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Lend a part of a tensor, shape (nbytes,): at most `most_bytes`, and valid inside the block only.

        Raises
        ------
        IngredientReadError
        """
        if not self._buffered:
            yield bytes_at(self.source.fetch(position, offset, nbytes, None), nbytes)
            return
        if nbytes > STRIP_BYTES:
            raise ValueError(f"{nbytes:,} bytes were asked for at once, but a strip has {STRIP_BYTES:,}")
        # Buffers belong to the thread and not to the source: there may be many ingredients.
        buffer = _strips.free.pop() if _strips.free else np.empty(STRIP_BYTES, np.uint8)
        try:
            yield bytes_at(self.source.fetch(position, offset, nbytes, buffer[:nbytes].data), nbytes)
        finally:
            _strips.free.append(buffer)
