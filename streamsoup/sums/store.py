"""Where a running sum is kept: in memory, or as a zarr store on disk."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import TensorTable
from streamsoup.errors import StreamsoupError
from streamsoup.maps import address_of
from streamsoup.source import Source
from streamsoup.write import Sink


class SumStore(Protocol):
    """Keeps one sum, and takes the next.

    Attributes
    ----------
    in_place : bool
        Whether the next sum is written over the current one.
    """

    @property
    def in_place(self) -> bool: ...

    def source(self) -> Source:
        """Return the bytes of the current sum, as an ingredient's."""
        ...

    def begin(self) -> Sink:
        """Return where the next sum is written. It counts only after `commit`."""
        ...

    def commit(self, members: Sequence[Sequence[Any]], content_digests: Mapping[str, str]) -> None:
        """Make what was written the current sum, and write down what it is the sum of."""
        ...


class InPlaceStore(Source, Sink):
    """A sum that is overwritten tile by tile: a tile of the next sum depends on that tile of the old alone.

    If a run fails half-way, the sum is neither old nor new, and reading it is an error until it is made anew.
    """

    in_place = True

    def __init__(self) -> None:
        self._whole = False

    def source(self) -> Source:
        """See `SumStore`."""
        if not self._whole:
            raise StreamsoupError("The running sum is incomplete after a failure. Make it anew.")
        return self

    def begin(self) -> Sink:
        """See `SumStore`."""
        self._whole = False
        return self

    def commit(self, members: Sequence[Sequence[Any]], content_digests: Mapping[str, str]) -> None:
        """See `SumStore`."""
        self._whole = True


class MemoryStore(InPlaceStore):
    """One array a tensor, in memory."""

    def __init__(self, table: TensorTable, averaged: npt.NDArray[np.bool_]) -> None:
        super().__init__()
        sizes = np.where(averaged, table.nbytes, 0)
        self._arrays = [np.empty(size, np.uint8) for size in sizes.tolist()]
        self._averaged = averaged

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        array = self._arrays[position]
        address = array.ctypes.data + offset
        if staging is None:
            return address
        target = address_of(staging)
        ctypes.memmove(target, address, nbytes)
        return target

    def room(self, tensor: int, offset: int, nbytes: int) -> memoryview | None:
        """See `Sink`."""
        return self._arrays[tensor][offset : offset + nbytes].data if self._averaged[tensor] else None

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """See `Sink`; copied tensors are not kept."""
        if not self._averaged[tensor]:
            return
        self._arrays[tensor][offset : offset + len(buffer)] = np.frombuffer(buffer, np.uint8)


@dataclass(frozen=True)
class WithBuffers(Source):
    """A source of a running sum whose copied tensors come from a checkpoint."""

    sums: Source
    checkpoint: Source
    averaged: npt.NDArray[np.bool_]

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        return self._source(position).fetch(position, offset, nbytes, staging)

    def resident(self, position: int, offset: int, nbytes: int, device: Any) -> Any | None:
        """See `Source`."""
        return self._source(position).resident(position, offset, nbytes, device)

    def load(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        self._source(position).load(position, offset, nbytes)

    def drop(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        self._source(position).drop(position, offset, nbytes)

    def _source(self, position: int) -> Source:
        return self.sums if self.averaged[position] else self.checkpoint

    def close(self) -> None:
        """See `Source`."""
        self.sums.close()
