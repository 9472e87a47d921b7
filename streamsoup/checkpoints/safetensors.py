"""Safetensors checkpoints: one file, or a folder with one file or with shards and an index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamsoup.checkpoints.header import Header, read_header
from streamsoup.checkpoints.pieces import Arrangement
from streamsoup.checkpoints.protocol import Shard, StoredCheckpoint
from streamsoup.checkpoints.scaled import Scalings
from streamsoup.checkpoints.shard_index import check_index, files_of
from streamsoup.checkpoints.table import TensorTable, concatenate
from streamsoup.checkpoints.torch_tensors import TorchTensor
from streamsoup.errors import CheckpointNotFoundError


@dataclass(frozen=True, slots=True)
class Parsed:
    """What was parsed before: headers by digest, names, joined tables by the digests of their shards, their scales.

    Of files of other formats: their tensors by the digest of what describes them, and where they lie.
    """

    headers: dict[str, Header] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    tables: dict[tuple[str, ...], TensorTable] = field(default_factory=dict)
    scalings: Scalings = field(default_factory=dict)
    torch_tensors: dict[str, Mapping[str, TorchTensor]] = field(default_factory=dict)
    arrangements: dict[tuple[str, ...], Arrangement] = field(default_factory=dict)


def open_safetensors(path: str, parsed: Parsed | None = None) -> StoredCheckpoint:
    """Read and check the headers (and the index) of a checkpoint; no tensor is read.

    Parameters
    ----------
    path : str
    parsed : Parsed, optional
        Changed. Fine-tunes of one network mostly have equal headers: those are parsed once and share their tables.

    Raises
    ------
    CheckpointNotFoundError, CheckpointError, HeaderError, ShardIndexError
    """
    where = Path(path)
    if where.is_dir():
        files, weight_map = files_of(where, "*.safetensors")
        folder = where
    elif where.exists():
        files, weight_map, folder = [str(where)], None, None
    else:
        raise CheckpointNotFoundError(f"{path}: no such file or folder.", path=path)
    parsed = Parsed() if parsed is None else parsed
    shards, tables, metadata = [], [], None
    for file in files:
        header, stat = read_header(file, parsed.headers, parsed.names)
        shards.append(Shard(file, stat.st_size, stat.st_mtime_ns, stat.st_ino, header.sha256))
        tables.append(header.table)
        metadata = header.metadata if metadata is None else metadata
    if weight_map is not None:
        check_index(where, weight_map, files, [table.names for table in tables])
    key = tuple(shard.header_sha256 for shard in shards)
    table = parsed.tables.get(key)
    if table is None:
        table = parsed.tables[key] = concatenate(tables)
    return StoredCheckpoint(path, folder, tuple(shards), table, metadata or {})
