"""Where every byte of the output goes, known before the first is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints.table import TensorTable
from streamsoup.dtypes import DTYPES

# The format asks for 8. A cache line keeps every element of the widest-first order on its natural boundary.
DATA_ALIGNMENT = 64


@dataclass(frozen=True)
class OutputShard:
    """One file to be written.

    Attributes
    ----------
    name : str
    head : bytes
        The length prefix and the header.
    file_bytes : int
    """

    name: str
    head: bytes
    file_bytes: int


@dataclass(frozen=True)
class Layout:
    """The files of a soup.

    Attributes
    ----------
    shards : tuple of OutputShard
    shard_of : int32 array, shape (tensors,)
    begins : int64 array, shape (tensors,)
        First byte of each tensor in its shard.
    index : str or None
        The index JSON, if there are several shards.
    data_bytes : int
        Bytes of all tensors.
    """

    shards: tuple[OutputShard, ...]
    shard_of: npt.NDArray[np.int32]
    begins: npt.NDArray[np.int64]
    index: str | None
    data_bytes: int

    @property
    def file_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.file_bytes for shard in self.shards)


def lay_out(
    table: TensorTable,
    out_dtypes: npt.NDArray[np.uint8],
    *,
    shard_bytes: int,
    metadata: Mapping[str, str],
    file_name: str | None = None,
) -> Layout:
    """Distribute tensors over shards as huggingface_hub does, and compute every offset.

    Shards are filled greedily in the order of the table; a tensor larger than a shard gets one of its own. Within
    a shard the widest dtypes come first, as the safetensors library writes them, so that all are aligned.

    Parameters
    ----------
    table : TensorTable
        Names and shapes.
    out_dtypes : uint8 array, shape (tensors,)
        Indices into `DTYPES`.
    shard_bytes : int
    metadata : mapping of str to str
    file_name : str, optional
        Put everything into one file of this name.
    """
    sizes = table.elements * np.array([d.itemsize for d in DTYPES], np.int64)[out_dtypes]
    shard_of = _fill(sizes, shard_bytes if file_name is None else None)
    count = int(shard_of[-1]) + 1 if len(shard_of) else 1
    names = [file_name or _shard_name(i, count) for i in range(count)]
    begins = np.zeros(len(table), np.int64)
    shards = []
    for number, name in enumerate(names):
        members = np.flatnonzero(shard_of == number)
        itemsizes = np.array([DTYPES[d].itemsize for d in out_dtypes[members]], np.int64)
        members = members[np.argsort(-itemsizes, kind="stable")]
        ends = np.cumsum(sizes[members])
        begins[members] = ends - sizes[members]
        head = _head(table, out_dtypes, members, begins, ends, metadata)
        begins[members] += len(head)
        shards.append(OutputShard(name, head, len(head) + int(ends[-1] if len(ends) else 0)))
    total = int(sizes.sum())
    index = None if count == 1 else _index(table.names, shard_of, names, total)
    return Layout(tuple(shards), shard_of, begins, index, total)


def _fill(sizes: npt.NDArray[np.int64], shard_bytes: int | None) -> npt.NDArray[np.int32]:
    shard_of = np.zeros(len(sizes), np.int32)
    number = used = 0
    for position, size in enumerate(sizes.tolist()):
        if shard_bytes is not None and used and used + size > shard_bytes:
            number, used = number + 1, 0
        used += size
        shard_of[position] = number
    return shard_of


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _head(
    table: TensorTable,
    out_dtypes: npt.NDArray[np.uint8],
    members: npt.NDArray[np.intp],
    begins: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    metadata: Mapping[str, str],
) -> bytes:
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for position, begin, end in zip(members.tolist(), begins[members].tolist(), ends.tolist(), strict=True):
        document[table.names[position]] = {
            "dtype": DTYPES[out_dtypes[position]].name,
            "shape": list(table.shape(position)),
            "data_offsets": [begin, end],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _index(names: Sequence[str], shard_of: npt.NDArray[np.int32], files: Sequence[str], total: int) -> str:
    weight_map = {name: files[shard] for name, shard in zip(names, shard_of.tolist(), strict=True)}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
