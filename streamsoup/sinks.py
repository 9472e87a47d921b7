"""Places for a soup other than files: memory, the tensors of a live module, a comparison."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from streamsoup.errors import MismatchError, UnsupportedDTypeError
from streamsoup.plan import Plan
from streamsoup.source import STRIP_BYTES, PartReader
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


class PartSink(Sink):
    """Collects a part of one tensor. See `Sink`.

    Parameters
    ----------
    begin, nbytes : int
        Which bytes of the tensor.

    Attributes
    ----------
    array : uint8 array, shape (nbytes,)
    """

    def __init__(self, begin: int, nbytes: int) -> None:
        self._begin = begin
        self.array = np.empty(nbytes, np.uint8)

    def room(self, tensor: int, offset: int, nbytes: int) -> memoryview:
        """See `Sink`."""
        start = offset - self._begin
        return self.array[start : start + nbytes].data

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """See `Sink`."""
        self.room(tensor, offset, len(buffer))[:] = buffer


def as_tensor(
    plan: Plan, tensor: int, raw: npt.NDArray[np.uint8], shape: tuple[int, ...] | None = None
) -> torch.Tensor:
    """View the bytes of a tensor of a soup as one of torch; `shape`: of a part of it.

    Raises
    ------
    UnsupportedDTypeError
        If torch has no such dtype.
    """
    import torch

    dtype = torch_dtype(plan, tensor)
    shape = plan.table.shape(tensor) if shape is None else shape
    return torch.frombuffer(raw, dtype=dtype).reshape(shape) if len(raw) else torch.empty(shape, dtype=dtype)


def torch_dtype(plan: Plan, tensor: int) -> torch.dtype:
    """Return the dtype of a tensor of a soup.

    Raises
    ------
    UnsupportedDTypeError
        If torch has none.
    """
    import torch

    dtype = plan.out_dtype(tensor)
    found = getattr(torch, dtype.torch_name, None) if dtype.torch_name else None
    if not isinstance(found, torch.dtype):
        raise UnsupportedDTypeError(
            f"{plan.table.names[tensor]}: {dtype.name} in {plan.checkpoints[0].path}, which torch has no dtype for. "
            "Write the soup to a file instead."
        )
    return found


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


@dataclass(frozen=True, slots=True, order=True)
class Difference:
    """An element that is not what it should be.

    Attributes
    ----------
    tensor : int
    element : int
        Counted through the whole tensor.
    expected, found : bytes
        Its bits, as they lie in the file.
    """

    tensor: int
    element: int
    expected: bytes
    found: bytes


class ComparingSink(Sink):
    """Compares what it gets with a checkpoint, bit for bit. See `Sink`.

    Parameters
    ----------
    plan : Plan
    reader : PartReader
        Of the checkpoint.
    positions : int64 array, shape (tensors,)
        Where the plan's tensors stand in its table.

    Attributes
    ----------
    compared_bytes, tiles, differing : int
        Bytes and tiles so far, and elements that are not the same.
    first : Difference or None
        The first of those, by tensor and element, in whatever order tiles came.

    Notes
    -----
    Memory: three strips for each thread that writes, `WORKER_BYTES`.
    """

    WORKER_BYTES = 3 * STRIP_BYTES

    def __init__(self, plan: Plan, reader: PartReader, positions: npt.NDArray[np.int64]) -> None:
        self.compared_bytes = self.tiles = self.differing = 0
        self.first: Difference | None = None
        self._plan = plan
        self._reader = reader
        self._positions = positions
        self._lock = threading.Lock()

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """See `Sink`."""
        position = int(self._positions[tensor])
        made = np.frombuffer(buffer, np.uint8)
        for start in range(0, len(made), STRIP_BYTES):
            expected = made[start : start + STRIP_BYTES]
            with self._reader.view(position, offset + start, len(expected)) as found:
                if not np.array_equal(expected, found):
                    self._note(tensor, offset + start, expected, found)
        with self._lock:
            self.compared_bytes += len(made)
            self.tiles += 1

    def _note(self, tensor: int, offset: int, expected: npt.NDArray[np.uint8], found: npt.NDArray[np.uint8]) -> None:
        itemsize = self._plan.out_dtype(tensor).itemsize
        wrong = np.flatnonzero((expected != found).reshape(-1, itemsize).any(axis=1))
        element = slice(int(wrong[0]) * itemsize, (int(wrong[0]) + 1) * itemsize)
        here = Difference(
            tensor, offset // itemsize + int(wrong[0]), expected[element].tobytes(), found[element].tobytes()
        )
        with self._lock:
            self.differing += len(wrong)
            self.first = here if self.first is None else min(self.first, here)
