"""Places for a soup other than files: memory, and the tensors of a live module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from streamsoup.errors import MismatchError
from streamsoup.plan import Plan
from streamsoup.write import Sink

if TYPE_CHECKING:
    import torch


class Nowhere(Sink):
    """Forgets what it gets: a run for its digests alone."""

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """See `Sink`."""


class MemorySink(Sink):
    """Collects tensors as arrays of bytes. See `Sink`.

    Attributes
    ----------
    arrays : dict of int to uint8 array
        By tensor; those that were written to.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.arrays: dict[int, npt.NDArray[np.uint8]] = {}

    def room(self, tensor: int, offset: int, nbytes: int) -> memoryview:
        """See `Sink`."""
        array = self.arrays.get(tensor)
        if array is None:
            whole = int(self._plan.table.elements[tensor]) * self._plan.out_dtype(tensor).itemsize
            array = self.arrays.setdefault(tensor, np.empty(whole, np.uint8))
        return array[offset : offset + nbytes].data

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """See `Sink`."""
        self.room(tensor, offset, len(buffer))[:] = buffer


def wait_for_caller(tensors: Iterable[torch.Tensor]) -> None:
    """Wait for what the calling thread has queued on the GPUs of some tensors: other threads work on other streams."""
    import torch

    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


class ModuleSink(Sink):
    """Writes into the parameters and buffers of a torch module. See `Sink`.

    Parameters
    ----------
    module : torch.nn.Module
        Changed tile by tile.
    plan : Plan
    strict : bool
        Refuse names that only one side has.

    Raises
    ------
    MismatchError
        Before anything is changed.
    """

    def __init__(self, module: torch.nn.Module, plan: Plan, *, strict: bool) -> None:
        state = {k: v for k, v in module.state_dict(keep_vars=True).items() if hasattr(v, "data_ptr")}
        table = plan.table
        problems = []
        for position, name in enumerate(table.names):
            if name not in state:
                if strict:
                    problems.append(f"{name}: in the soup, but not in the module. Give strict=False to leave it out.")
            elif tuple(state[name].shape) != table.shape(position):
                problems.append(
                    f"{name}: shape {tuple(state[name].shape)} in the module, but {table.shape(position)} in the soup."
                )
            elif state[name].is_meta:
                problems.append(f"{name}: is on the meta device in the module. Give it memory before loading.")
            elif not state[name].is_contiguous():
                problems.append(f"{name}: is not contiguous in the module. Make it so before loading.")
        if strict:
            known = set(table.names)
            here = {state[name].data_ptr() for name in table.names if name in state}
            problems += [
                f"{name}: in the module, but not in the soup. Give strict=False to leave it as it is."
                for name, tensor in state.items()
                if name not in known and tensor.data_ptr() not in here
            ]
        if problems:
            raise MismatchError(problems)
        self._plan = plan
        wait_for_caller(state.values())
        self._targets = [state[n].detach().view(-1) if n in state else None for n in table.names]
        self._rooms = [self._whole_room(position) for position in range(len(table))]

    def _whole_room(self, tensor: int) -> memoryview | None:
        """Return the memory of a parameter that can be written as it is: on the CPU, and in the soup's dtype."""
        import torch

        target = self._targets[tensor]
        dtype = self._plan.out_dtype(tensor)
        if target is None or target.device.type != "cpu" or target.dtype != getattr(torch, dtype.torch_name, None):
            return None
        return memoryview(target.view(torch.uint8).numpy())

    def room(self, tensor: int, offset: int, nbytes: int) -> memoryview | None:
        """See `Sink`."""
        room = self._rooms[tensor]
        if room is None:
            return None
        target = self._targets[tensor]
        assert target is not None
        target[:0].zero_()  # tells autograd, which cannot see who writes, that the tensor changed
        return room[offset : offset + nbytes]

    def resident(self, tensor: int, offset: int, nbytes: int, device: Any) -> Any | None:
        """See `Sink`."""
        import torch

        target = self._targets[tensor]
        if target is None or target.device != device:
            return None
        if target.dtype != getattr(torch, self._plan.out_dtype(tensor).torch_name, None):
            return None
        target[:0].zero_()  # see `room`
        return target.view(torch.uint8)[offset : offset + nbytes]

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """See `Sink`."""
        import torch

        target = self._targets[tensor]
        if target is None:
            return
        dtype = self._plan.out_dtype(tensor)
        start = offset // dtype.itemsize
        tile = torch.frombuffer(buffer, dtype=getattr(torch, dtype.torch_name))
        with torch.no_grad():
            target[start : start + len(tile)].copy_(tile)
