"""A running sum in the memory of a device: a trial moves no bytes over the bus but the new ingredient's."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from streamsoup.backends.protocol import Backend
from streamsoup.checkpoints import TensorTable
from streamsoup.maps import address_of
from streamsoup.sums.store import InPlaceStore


class DeviceStore(InPlaceStore):
    """One array a tensor, on the backend's first device.

    Slots of that device read and write it where it is; those of another get it through the host.

    Raises
    ------
    DeviceMemoryError
        If the device has no room for it.
    """

    def __init__(self, table: TensorTable, averaged: npt.NDArray[np.bool_], backend: Backend) -> None:
        super().__init__()
        sizes = np.where(averaged, table.nbytes, 0)
        starts = np.concatenate([[0], np.cumsum(-(-sizes // _ALIGNMENT) * _ALIGNMENT)])
        self._memory: torch.Tensor = backend.hold(int(starts[-1]))
        self._arrays = [self._memory[a : a + n] for a, n in zip(starts.tolist(), sizes.tolist(), strict=False)]
        self._averaged = averaged

    def resident(self, position: int, offset: int, nbytes: int, device: Any) -> torch.Tensor | None:
        """See `Source` and `Sink`."""
        if device != self._memory.device or not self._averaged[position]:
            return None
        there: torch.Tensor = self._arrays[position][offset : offset + nbytes]
        return there

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        if staging is None:
            raise ValueError("what lies on a device needs a staging buffer")
        here = self._arrays[position][offset : offset + nbytes].cpu()
        target = address_of(staging)
        ctypes.memmove(target, here.data_ptr(), nbytes)
        return target

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """See `Sink`; copied tensors are not kept."""
        if self._averaged[tensor] and len(buffer):
            self._arrays[tensor][offset : offset + len(buffer)].copy_(torch.frombuffer(buffer, dtype=torch.uint8))


_ALIGNMENT = 256  # of each tensor, in bytes: as kernels like it
