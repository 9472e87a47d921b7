"""Checkpoints of `torch.distributed.checkpoint` (DCP), as FSDP and others save them, read without torch.

The folder's ``.metadata`` is a pickle: tensors, the rectangles (chunks) that processes saved of them, and the byte
range of each in a ``.distcp`` file. A byte range is what `torch.save` wrote of one chunk: a zip file in the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np

from streamsoup.checkpoints.gathering import Sizes
from streamsoup.checkpoints.header import reading
from streamsoup.checkpoints.nested import model_tensors, unwrapped
from streamsoup.checkpoints.pickled import Made, Named
from streamsoup.checkpoints.pickles import MAX_PICKLE_BYTES, read_pickle
from streamsoup.checkpoints.pieces import Piece, Pieced, arrange
from streamsoup.checkpoints.protocol import Checkpoint, Shard
from streamsoup.checkpoints.safetensors import Parsed
from streamsoup.checkpoints.torch_archive import Archive, digest_of, expect_inside, left_cold
from streamsoup.checkpoints.torch_tensors import TORCH_DTYPES, TorchTensor, is_tensor, read_tensor, sizes_of
from streamsoup.dtypes import DType
from streamsoup.errors import CheckpointError, UnsupportedDTypeError

_METADATA = ".metadata"
_MODULE = "torch.distributed."
_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A rectangle of a tensor and its byte range in a file."""

    offsets: Sizes
    sizes: Sizes
    file: str
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Saved:
    """A tensor as the metadata describe it."""

    name: str
    dtype: DType
    shape: Sizes
    chunks: Sequence[_Chunk]


def is_torch_distributed(path: str) -> bool:
    """Whether a path names a folder of `torch.distributed.checkpoint`."""
    where = Path(path)
    return (where / _METADATA).is_file() and not any(where.glob("*.safetensors*"))


def open_torch_distributed(path: str, key: str | None = None, parsed: Parsed | None = None) -> Checkpoint:
    """Read what a folder of `torch.distributed.checkpoint` says of its tensors; no tensor is read.

    Nothing of its pickles is run, and no process group is needed.

    Parameters
    ----------
    path : str
    key : str, optional
        Where the model is; see `streamsoup.checkpoints.nested.model_tensors`.
    parsed : Parsed, optional
        Changed.

    Returns
    -------
    Checkpoint
        A `StoredCheckpoint` if each tensor is one chunk; else a `PiecedCheckpoint`.

    Raises
    ------
    CheckpointNotFoundError, CheckpointError, UnsupportedDTypeError
    """
    folder = Path(path)
    parsed = Parsed() if parsed is None else parsed
    saved = _Metadata(folder).tensors(key)
    files = sorted({chunk.file for tensor in saved.values() for chunk in tensor.chunks})
    shards, places = [], {}
    for number, file in enumerate(files):
        wanted = [(t, c) for t in saved.values() for c in t.chunks if c.file == file]
        shard, pieces = _look_into(folder / file, number, wanted)
        shards.append(shard)
        places.update(pieces)
    known = (key or "", *saved, *(shard.header_sha256 for shard in shards))
    arrangement = parsed.arrangements.get(known)
    if arrangement is None:
        names = unwrapped(list(saved))
        arrangement = parsed.arrangements[known] = arrange(
            [
                Pieced(name, tensor.dtype, tensor.shape, [places[tensor.name, c.offsets] for c in tensor.chunks])
                for name, tensor in zip(names, saved.values(), strict=True)
            ]
        )
    return arrangement.checkpoint(path, folder, tuple(shards), {})


class _Metadata:
    """The pickle that describes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = str(folder / _METADATA)
        with reading(self._path, "a checkpoint") as (fd, stat):
            if stat.st_size > MAX_PICKLE_BYTES:
                self._damaged(f"has {stat.st_size:,} bytes, more than the {MAX_PICKLE_BYTES:,} that are read")
            raw = os.pread(fd, stat.st_size, 0)
        document = read_pickle(raw, self._path)
        if not isinstance(document, Made) or not document.name.startswith(_MODULE):
            self._damaged("is not the metadata of torch.distributed.checkpoint")
        fields = self._fields(document)
        self._tensors = self._mapping(fields.get("state_dict_metadata"))
        self._paths = fields.get("planner_data")
        self._ranges = self._ranges_of(self._mapping(fields.get("storage_data")))

    def tensors(self, key: str | None) -> dict[str, _Saved]:
        """Return the model's tensors by their names in it."""
        found = model_tensors(self._nested(), key, self._path, _is_tensor, self._look)
        return {name: self._saved(leaf) for name, leaf in found.items()}

    def _look(self, value: Any) -> Any:
        """Read what was saved as bytes, since it may be an array or an object with tensors."""
        # What layers save beside their tensors has this name in torch, and is for them alone.
        if value.name.rpartition(".")[2] == "_extra_state":
            return None
        file, begin, nbytes = self._range(value.name, ())
        path = str(self._folder / file)
        with reading(path, "a checkpoint") as (fd, stat), left_cold(fd, path, stat.st_size):
            expect_inside(value.name, path, begin + nbytes, stat.st_size)
            where = f"{path} at byte {begin:,}"
            return read_pickle(Archive(fd, where, begin, nbytes).pickle, where)

    def _nested(self) -> dict[Any, Any]:
        """Put the flat names of the metadata back into the mappings that were saved."""
        paths = self._paths if isinstance(self._paths, dict) else {}
        top: dict[Any, Any] = {}
        for name, value in self._tensors.items():
            steps = paths.get(name, (name,))
            if not isinstance(steps, tuple) or not steps or not all(isinstance(s, str | int) for s in steps):
                self._damaged(f"has no path for {name}")
            at = top
            for step in steps[:-1]:
                at = at.setdefault(step, {})
                if type(at) is not dict:
                    self._damaged(f"has two values for {name}")
            is_leaf = isinstance(value, Made) and value.name.endswith(".TensorStorageMetadata")
            at[steps[-1]] = _Leaf(name, value if is_leaf else None)
        return top

    def _saved(self, leaf: _Leaf) -> _Saved:
        fields = self._fields(leaf.value)
        shape, chunks = sizes_of(fields.get("size")), fields.get("chunks")
        properties = fields.get("properties")
        state = properties.state if isinstance(properties, Made) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if shape is None or not isinstance(chunks, list) or not isinstance(dtype, Named):
            self._damaged(f"does not describe {leaf.name}")
        if dtype.name not in TORCH_DTYPES:
            raise UnsupportedDTypeError(
                f"{leaf.name}: is of {dtype.name} in {self._path}, which cannot be averaged. Leave it out.",
                path=self._path,
            )
        if math.prod(shape) * 16 >= 2**62:
            self._damaged(f"describes {leaf.name} with a shape of more than 2^58 elements")
        places = [self._place(leaf.name, self._fields(chunk), len(shape)) for chunk in chunks]
        wanted = [(offsets, sizes) for offsets, sizes in places if 0 not in sizes] or places[:1]
        owned = [_Chunk(offsets, sizes, *self._range(leaf.name, offsets)) for offsets, sizes in wanted]
        if not owned:
            self._damaged(f"has no chunks of {leaf.name}")
        self._expect_cover(leaf.name, shape, owned)
        return _Saved(leaf.name, TORCH_DTYPES[dtype.name], shape, owned)

    def _place(self, name: str, fields: Mapping[str, Any], rank: int) -> tuple[Sizes, Sizes]:
        offsets, sizes = sizes_of(fields.get("offsets")), sizes_of(fields.get("sizes"))
        if offsets is None or sizes is None or len(offsets) != rank or len(sizes) != rank:
            self._damaged(f"has a chunk of {name} of another rank")
        return offsets, sizes

    def _range(self, name: str, offsets: Sizes) -> tuple[str, int, int]:
        found = self._ranges.get((name, offsets))
        if found is None and not any(offsets):
            found = self._ranges.get((name, ()))  # of a tensor that one process saved whole
        if found is None:
            self._damaged(f"does not say where the chunk of {name} at {offsets} is")
        return found

    def _ranges_of(self, storage: Mapping[Any, Any]) -> dict[tuple[str, Sizes], tuple[str, int, int]]:
        found = {}
        for index, info in storage.items():
            where, fields = self._fields(index), self._fields(info)
            offsets = sizes_of(where["offset"]) if where.get("offset") is not None else ()
            name, file = where.get("fqn"), fields.get("relative_path")
            begin, nbytes = fields.get("offset"), fields.get("length")
            if type(name) is not str or type(file) is not str or offsets is None:
                self._damaged("has an entry without a name or a file")
            if type(begin) is not int or type(nbytes) is not int or begin < 0 or nbytes < 0:
                self._damaged(f"gives no byte range for {name}")
            if PurePosixPath(file).name != file or "\\" in file:
                self._damaged(f"places {name} in {file!r}, outside the folder")
            if fields.get("transform_descriptors"):
                raise CheckpointError(
                    f"{name}: is compressed or encrypted by an extension in {self._path}. Save it without extensions.",
                    path=self._path,
                )
            found[name, offsets] = file, begin, nbytes
        return found

    def _expect_cover(self, name: str, shape: Sizes, chunks: Sequence[_Chunk]) -> None:
        """Refuse chunks that overlap, leave a gap or reach outside: what is in bounds, apart and enough covers all."""
        lows = np.array([c.offsets for c in chunks], np.int64).reshape(len(chunks), len(shape))
        highs = lows + np.array([c.sizes for c in chunks], np.int64).reshape(lows.shape)
        if (highs > np.array(shape, np.int64)).any():
            self._damaged(f"has a chunk of {name} that reaches outside its shape {shape}")
        for first in range(0, len(chunks), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            common = np.minimum(highs[rows, None], highs) - np.maximum(lows[rows, None], lows)
            apart = (common <= 0).any(axis=2)
            apart[np.arange(len(apart)), np.arange(first, first + len(apart))] = True
            if not apart.all() and 0 not in shape:
                one, other = np.argwhere(~apart)[0].tolist()
                places = f"{chunks[first + one].offsets} and {chunks[other].offsets}"
                self._damaged(f"has chunks of {name} that overlap, at {places}")
        have = sum(math.prod(c.sizes) for c in chunks)
        if have != math.prod(shape):
            self._damaged(f"has chunks for {have:,} of {math.prod(shape):,} elements of {name}")

    def _fields(self, value: Any) -> Mapping[str, Any]:
        return self._mapping(value.state if isinstance(value, Made) else None)

    def _mapping(self, value: Any) -> Mapping[Any, Any]:
        if not isinstance(value, dict):
            self._damaged("is not laid out as torch.distributed.checkpoint does it")
        return value

    def _damaged(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {problem}. Save or copy the checkpoint again.", path=self._path)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A tensor among nested mappings, or (None) what was saved as bytes."""

    name: str
    value: Made | None


def _is_tensor(value: Any) -> bool:
    return value.value is not None if isinstance(value, _Leaf) else is_tensor(value)


def _look_into(
    file: Path, number: int, wanted: Sequence[tuple[_Saved, _Chunk]]
) -> tuple[Shard, dict[tuple[str, Sizes], Piece]]:
    """Find the numbers of chunks in their file."""
    path = str(file)
    with reading(path, "a checkpoint") as (fd, stat), left_cold(fd, path, stat.st_size):
        pieces = dict(_pieces(fd, path, stat.st_size, number, wanted))
    described = [
        (tensor.name, tensor.dtype.name, tensor.shape, piece.begin, piece.offsets, piece.sizes, piece.strides)
        for (tensor, _), piece in zip(wanted, pieces.values(), strict=True)
    ]
    return Shard(path, stat.st_size, stat.st_mtime_ns, stat.st_ino, digest_of(described)), pieces


def _pieces(
    fd: int, path: str, size_bytes: int, number: int, wanted: Sequence[tuple[_Saved, _Chunk]]
) -> Iterator[tuple[tuple[str, Sizes], Piece]]:
    understood: dict[bytes, TorchTensor] = {}  # most chunks are described alike
    for tensor, chunk in wanted:
        where = f"{path} at byte {chunk.begin:,}"
        expect_inside(tensor.name, path, chunk.begin + chunk.nbytes, size_bytes)
        archive = Archive(fd, where, chunk.begin, chunk.nbytes)
        stored = understood.get(archive.pickle)
        if stored is None:
            value = read_pickle(archive.pickle, where)
            if not is_tensor(value):
                raise CheckpointError(f"{tensor.name}: {where} is no tensor. Save the checkpoint again.", path=path)
            stored = understood[archive.pickle] = read_tensor(value, tensor.name, path)
        have = archive.place(f"data/{stored.storage}") if f"data/{stored.storage}" in archive else (0, 0)
        if (stored.dtype, stored.shape) != (tensor.dtype, chunk.sizes) or stored.stored_bytes > have[1]:
            raise CheckpointError(
                f"{tensor.name}: {where} does not hold {tensor.dtype.name} of shape {chunk.sizes}, as its metadata "
                "say. Save the checkpoint again.",
                path=path,
            )
        begin = have[0] + stored.first * stored.dtype.itemsize
        yield (tensor.name, chunk.offsets), Piece(number, begin, chunk.offsets, chunk.sizes, stored.strides)
