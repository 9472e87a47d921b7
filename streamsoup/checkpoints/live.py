"""Tensors of a running program as an ingredient: the state of a module in training, a dict of arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints.gathering import copy_apart
from streamsoup.checkpoints.protocol import Shard
from streamsoup.checkpoints.table import TensorTable, pack
from streamsoup.dtypes import DType, find_dtype
from streamsoup.errors import CheckpointError, StreamsoupError, UnsupportedDTypeError
from streamsoup.maps import address_of
from streamsoup.source import STRIP_BYTES, Source

_BEFORE, _AFTER = "live state ", ", not on disk"
# Same bits under a dtype that torch and numpy both have.
_BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


@dataclass(frozen=True, eq=False)
class LiveCheckpoint:
    """A `Checkpoint` without files, over memory that belongs to somebody else.

    Attributes
    ----------
    path : str
        What it is, in words.
    table : TensorTable
    arrays : tuple of integer array or torch tensor or None
        The bits of each tensor: of numpy where they are in the host's memory, of torch where they are on a device.
        None: they are not kept.
    """

    path: str
    table: TensorTable
    arrays: tuple[Any, ...]
    folder: Path | None = None
    shards: tuple[Shard, ...] = ()

    @property
    def metadata(self) -> Mapping[str, str]:
        """No free text."""
        return {}

    @property
    def needs_buffers(self) -> bool:
        """Whether something is not in the host's memory in one piece."""
        return not all(array is None or _is_plain(array) for array in self.arrays)

    def take(self, positions: npt.NDArray[np.int64], table: TensorTable) -> LiveCheckpoint:
        """Pick tensors; `table` describes them."""
        return replace(self, table=table, arrays=tuple(self.arrays[i] for i in positions.tolist()))

    def without(self, averaged: npt.NDArray[np.bool_], kept: tuple[Any, ...] | None = None) -> LiveCheckpoint:
        """Describe it without holding any memory of others: copied tensors alone are kept, as copies.

        Parameters
        ----------
        averaged : bool array, shape (tensors,)
        kept : tuple, optional
            Copies that were made of another state, to be used instead.
        """
        if kept is None:
            pairs = zip(self.arrays, averaged.tolist(), strict=True)
            kept = tuple(None if floats or array is None else _copied(array) for array, floats in pairs)
        return replace(self, arrays=kept)


def live_name(number: int) -> str:
    """Name a live state for messages and records."""
    return f"{_BEFORE}{number}{_AFTER}"


def is_live_name(path: str) -> bool:
    """Whether this names a live state, and no file."""
    return path.startswith(_BEFORE) and path.endswith(_AFTER)


def is_state(given: object) -> bool:
    """Whether this is a dict of tensors, or something with a `state_dict`, such as a module."""
    return isinstance(given, dict) or callable(getattr(given, "state_dict", None))


def open_live(state: Any, path: str, *, like: TensorTable | None = None) -> LiveCheckpoint:
    """Describe the tensors of a running program, without copying any.

    Parameters
    ----------
    state : dict of str to tensor or array, or torch.nn.Module
        torch tensors on any device and of any strides, or numpy arrays.
    path : str
        What to call it.
    like : TensorTable, optional
        What it is to be added to. A name that is not in it is left out if its tensor is tied to one that is: the very
        same memory under another name.

    Raises
    ------
    CheckpointError, UnsupportedDTypeError
    """
    given = state if isinstance(state, dict) else state.state_dict(keep_vars=True)
    entries = {str(name): _entry(str(name), value, path) for name, value in given.items()}
    if like is not None:
        entries = _without_tied(entries, like)
    shapes = [tuple(array.shape) for array, _ in entries.values()]
    dtypes = [dtype for _, dtype in entries.values()]
    sizes = [int(np.prod(shape, dtype=np.int64)) * d.itemsize for shape, d in zip(shapes, dtypes, strict=True)]
    begins = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[:-1].tolist()
    table = pack(list(entries), dtypes, shapes, begins)
    if like is not None and table.same_layout(like) and np.array_equal(table.dtypes, like.dtypes):
        table = like  # one table for all states of a run
    return LiveCheckpoint(path, table, tuple(array for array, _ in entries.values()))


def _entry(name: str, value: Any, path: str) -> tuple[Any, DType]:
    """Return the bits of one tensor, and its dtype."""
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        found = find_dtype(value.dtype.name) if value.dtype.isnative else None
        if found is not None:
            return value.view(f"i{value.dtype.itemsize}" if value.dtype.itemsize > 1 else np.uint8), found
        raise UnsupportedDTypeError(f"{name}: {value.dtype!r} in {path} cannot be averaged or copied. Convert it.")
    if not hasattr(value, "data_ptr"):
        raise CheckpointError(
            f"{name}: a {type(value).__name__} in {path}, where tensors and arrays are expected. Leave it out."
        )
    return _torch_entry(name, value, path)


def _torch_entry(name: str, value: Any, path: str) -> tuple[Any, DType]:
    import torch

    what = None
    if value.layout != torch.strided or value.is_quantized:
        what = "is sparse or quantised"
    elif hasattr(value, "__tensor_flatten__"):  # DTensor of FSDP, quantised weights of torchao
        what = f"is a {type(value).__name__}, which has its numbers elsewhere"
    elif value.is_meta:
        what = "is on the meta device"
    if what is not None:
        raise CheckpointError(f"{name}: {what} in {path}. Give plain tensors, with all of their elements.")
    found = find_dtype(str(value.dtype))
    if found is None:
        raise UnsupportedDTypeError(f"{name}: {value.dtype} in {path} cannot be averaged or copied. Convert it.")
    bits = value.detach().resolve_conj().resolve_neg().view(getattr(torch, _BITS[value.element_size()]))
    return (bits.numpy() if bits.device.type == "cpu" else bits), found


def _without_tied(entries: dict[str, tuple[Any, DType]], like: TensorTable) -> dict[str, tuple[Any, DType]]:
    names = set(like.names)
    places = {_place(array, dtype) for name, (array, dtype) in entries.items() if name in names}
    return {n: e for n, e in entries.items() if n in names or not _size(e[0]) or _place(*e) not in places}


def _size(array: Any) -> int:
    return int(array.size if isinstance(array, np.ndarray) else array.numel())


def _place(array: Any, dtype: DType) -> tuple[Any, ...]:
    if isinstance(array, np.ndarray):
        return "host", array.ctypes.data, array.shape, array.strides, dtype.name
    return str(array.device), array.data_ptr(), tuple(array.shape), array.stride(), dtype.name


def _is_plain(array: Any) -> bool:
    return isinstance(array, np.ndarray) and bool(array.flags.c_contiguous)


def _copied(array: Any) -> npt.NDArray[Any]:
    host = array if isinstance(array, np.ndarray) else array.cpu().numpy()
    return np.array(host, order="C", copy=True)


class LiveSource(Source):
    """The bytes of a live state. See `Source`.

    Notes
    -----
    Memory: none of its own; what has other strides is copied in strips of 256 KiB.
    """

    def __init__(self, checkpoint: LiveCheckpoint) -> None:
        self._path = checkpoint.path
        self._names = checkpoint.table.names
        self._arrays = checkpoint.arrays

    def _array(self, position: int) -> Any:
        array = self._arrays[position]
        if array is None:
            raise StreamsoupError(
                f"{self._names[position]}: of {self._path}, and nothing is kept of its numbers but in the running sum."
            )
        return array

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        array = self._array(position)
        if _is_plain(array):
            address: int = array.ctypes.data + offset
            if staging is None:
                return address
            ctypes.memmove(address_of(staging), address, nbytes)
            return address_of(staging)
        if staging is None:
            raise ValueError("what is not in one piece needs a staging buffer")
        itemsize = array.itemsize  # torch has it under the same name
        bits = np.uint8 if itemsize == 1 else np.dtype(f"i{itemsize}")
        _copy_range(array, offset // itemsize, np.frombuffer(staging[:nbytes], bits))
        return address_of(staging)

    def resident(self, position: int, offset: int, nbytes: int, device: Any) -> Any | None:
        """See `Source`."""
        import torch

        array = self._array(position)
        if isinstance(array, np.ndarray) or array.device != device or not array.is_contiguous():
            return None
        return array.view(-1).view(torch.uint8)[offset : offset + nbytes]


def _copy_range(array: Any, start: int, target: npt.NDArray[Any]) -> None:
    """Copy elements from `start` on, in the order of their indices, of an array with any strides."""
    count = len(target)
    if count == 0:
        return
    if array.ndim <= 1 or (not isinstance(array, np.ndarray) and array.is_contiguous()):
        _put(array.reshape(-1)[start : start + count], target)
        return
    width = _size(array) // len(array)
    strip = max(1, STRIP_BYTES // array.itemsize // width)  # rows; a device makes a temporary of what it gathers
    done = 0
    while done < count:
        row, column = divmod(start + done, width)
        rows = min((count - done) // width, strip)
        if column or not rows or width * array.itemsize > STRIP_BYTES:
            part = min(width - column, count - done)
            _copy_range(array[row], column, target[done : done + part])
        else:
            part = rows * width
            _put(array[row : row + rows], target[done : done + part])
        done += part


def _put(part: Any, target: npt.NDArray[Any]) -> None:
    if isinstance(part, np.ndarray):
        copy_apart(target.reshape(part.shape), part)
        return
    import torch

    torch.from_numpy(target).view(part.shape).copy_(part)
