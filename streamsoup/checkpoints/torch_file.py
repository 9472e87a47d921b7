"""Checkpoints that `torch.save` wrote: zip files whose tensors are read where they lie, without torch.

Of several files, each is one shard, as of a safetensors checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamsoup.checkpoints.header import reading
from streamsoup.checkpoints.nested import model_tensors, unwrapped
from streamsoup.checkpoints.pickles import read_pickle
from streamsoup.checkpoints.pieces import Arrangement, Piece, Pieced, arrange
from streamsoup.checkpoints.protocol import Checkpoint, Shard
from streamsoup.checkpoints.safetensors import Parsed
from streamsoup.checkpoints.shard_index import check_index, files_of
from streamsoup.checkpoints.torch_archive import Archive, digest_of, left_cold
from streamsoup.checkpoints.torch_tensors import TorchTensor, is_tensor, read_tensor
from streamsoup.errors import CheckpointError

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_FOLDER_PATTERN = "*_model*.bin"  # pytorch_model, diffusion_pytorch_model, adapter_model
_Tensors = Mapping[str, TorchTensor]


@dataclass(frozen=True, slots=True)
class _File:
    """A shard, its tensors, and where their storages are: begin and size of each entry."""

    shard: Shard
    tensors: _Tensors
    places: Mapping[str, tuple[int, int]]


def is_torch_file(path: str) -> bool:
    """Whether a path names a file of `torch.save`, or a folder of them without safetensors files."""
    where = Path(path)
    if not where.is_dir():
        return where.suffix.lower() in _SUFFIXES
    return any(where.glob(_FOLDER_PATTERN)) and not any(where.glob("*.safetensors*"))


def open_torch_file(path: str, key: str | None = None, parsed: Parsed | None = None) -> Checkpoint:
    """Read what a file of `torch.save` says of its tensors, or a folder of ``*_model*.bin``; no tensor is read.

    Nothing of the file is run: its pickle is read as data (`streamsoup.checkpoints.pickles`).

    Parameters
    ----------
    path : str
    key : str, optional
        Where the model is in the file; see `streamsoup.checkpoints.nested.model_tensors`.
    parsed : Parsed, optional
        Changed. Equal pickles are read once.

    Returns
    -------
    Checkpoint
        A `StoredCheckpoint`; a `PiecedCheckpoint` if there are tensors with strides.

    Raises
    ------
    CheckpointNotFoundError, CheckpointError, ShardIndexError, UnsupportedDTypeError
    """
    where = Path(path)
    parsed = Parsed() if parsed is None else parsed
    weight_map, folder, names = None, None, [path]
    if where.is_dir():
        folder = where
        names, weight_map = files_of(where, _FOLDER_PATTERN)
    files = [_read_file(name, key, parsed) for name in names]
    if weight_map is not None:
        check_index(where, weight_map, names, [list(file.tensors) for file in files])
    shards = tuple(file.shard for file in files)
    known = tuple(shard.header_sha256 for shard in shards)
    arrangement = parsed.arrangements.get(known)
    if arrangement is None:
        arrangement = parsed.arrangements[known] = _arranged(files, path)
    return arrangement.checkpoint(path, folder, shards, {})


def _read_file(path: str, key: str | None, parsed: Parsed) -> _File:
    with reading(path, "a checkpoint") as (fd, stat), left_cold(fd, path, stat.st_size):
        archive = Archive(fd, path, 0, stat.st_size)
        pickled = digest_of(archive.pickle, key)
        tensors = parsed.torch_tensors.get(pickled)
        if tensors is None:
            tensors = parsed.torch_tensors[pickled] = _understand(archive.pickle, key, path)
        places = {}
        for name, tensor in tensors.items():
            storage = tensor.storage
            if storage not in places:
                if f"data/{storage}" not in archive:
                    raise CheckpointError(
                        f"{name}: its numbers (data/{storage}) are missing from {path}. Copy or download it again.",
                        path=path,
                    )
                places[storage] = archive.place(f"data/{storage}")
            _expect_enough(name, tensor, places[storage][1], path)
    digest = digest_of(pickled, sorted(places.items()))
    return _File(Shard(path, stat.st_size, stat.st_mtime_ns, stat.st_ino, digest), tensors, places)


def _understand(pickle: bytes, key: str | None, path: str) -> _Tensors:
    found = model_tensors(read_pickle(pickle, path), key, path, is_tensor)
    try:
        "".join(found).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: a tensor's name is not valid Unicode. Rename it.", path=path) from None
    return {name: read_tensor(value, name, path) for name, value in found.items()}


def _expect_enough(name: str, tensor: TorchTensor, nbytes: int, path: str) -> None:
    if tensor.stored_bytes > nbytes:
        raise CheckpointError(
            f"{name}: needs {tensor.stored_bytes:,} bytes of data/{tensor.storage} in {path}, which has {nbytes:,}. "
            "Copy or download the file again.",
            path=path,
        )


def _arranged(files: Sequence[_File], path: str) -> Arrangement:
    tensors = [(number, name, t) for number, file in enumerate(files) for name, t in file.tensors.items()]
    names = unwrapped([name for _, name, _ in tensors])
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path}: two of its files hold a tensor of one name. Export it again.", path=path)
    return arrange([_pieced(files[n], n, name, t) for name, (n, _, t) in zip(names, tensors, strict=True)])


def _pieced(file: _File, number: int, name: str, tensor: TorchTensor) -> Pieced:
    begin = file.places[tensor.storage][0]
    if 0 not in tensor.shape:
        begin += tensor.first * tensor.dtype.itemsize
    piece = Piece(number, begin, (0,) * len(tensor.shape), tensor.shape, tensor.strides)
    return Pieced(name, tensor.dtype, tensor.shape, [piece])
