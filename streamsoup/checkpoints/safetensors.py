"""Safetensors checkpoints: one file, or a folder with one file or with shards and an index."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from streamsoup.checkpoints.header import Header, read_header
from streamsoup.checkpoints.protocol import Shard, StoredCheckpoint
from streamsoup.checkpoints.scaled import Scalings
from streamsoup.checkpoints.table import TensorTable, concatenate
from streamsoup.errors import CheckpointNotFoundError, ShardIndexError

INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Parsed:
    """What was parsed before: headers by digest, names, joined tables by the digests of their shards, their scales."""

    headers: dict[str, Header] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    tables: dict[tuple[str, ...], TensorTable] = field(default_factory=dict)
    scalings: Scalings = field(default_factory=dict)


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
        files, weight_map = _files_of(where)
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
        _check_index(where, weight_map, files, tables)
    key = tuple(shard.header_sha256 for shard in shards)
    table = parsed.tables.get(key)
    if table is None:
        table = parsed.tables[key] = concatenate(tables)
    return StoredCheckpoint(path, folder, tuple(shards), table, metadata or {})


def _files_of(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Find the files of a folder, and its weight map if it has an index."""
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1:
        raise ShardIndexError(
            f"{folder}: {len(indices)} index files ({', '.join(i.name for i in indices)}). Name one checkpoint.",
            path=str(folder),
        )
    if indices:
        weight_map = _read_index(indices[0])
        names = sorted(set(weight_map.values()))
        if whole := [f.name for f in files if f.name not in names]:
            raise ShardIndexError(
                f"{folder}: {whole[0]} is not listed in {indices[0].name}. Remove the file or the index.",
                path=str(folder),
            )
        for name in names:
            if PurePosixPath(name).name != name or "\\" in name:
                raise ShardIndexError(
                    f"{indices[0]}: shard {name!r} lies outside the folder. Export the checkpoint again.",
                    path=str(indices[0]),
                )
            if not (folder / name).is_file():
                raise ShardIndexError(
                    f"{indices[0]}: names shard {name}, which is missing from {folder}. Download it again.",
                    path=str(indices[0]),
                )
        return [str(folder / name) for name in names], weight_map
    if len(files) == 1:
        return [str(files[0])], None
    if not files:
        raise CheckpointNotFoundError(
            f"{folder}: no .safetensors file in this folder. Name a checkpoint folder or file.",
            path=str(folder),
        )
    raise ShardIndexError(
        f"{folder}: {len(files)} .safetensors files but no index. Name one of the files, or add the index.",
        path=str(folder),
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        weight_map = document["weight_map"]
        if not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ShardIndexError(
            f"{path}: not an index with a 'weight_map' of names to shards. Export the checkpoint again.",
            path=str(path),
        ) from None
    return dict(weight_map)


def _check_index(folder: Path, weight_map: dict[str, str], files: list[str], tables: list[TensorTable]) -> None:
    seen: dict[str, str] = {}
    for file, table in zip(files, tables, strict=True):
        shard = Path(file).name
        for name in table.names:
            if name in seen:
                raise ShardIndexError(
                    f"{name}: stored in {seen[name]} and again in {shard} of {folder}. Export it again.",
                    path=file,
                )
            seen[name] = shard
            if weight_map.get(name) != shard:
                raise ShardIndexError(
                    f"{name}: stored in {shard} of {folder}, but the index says {weight_map.get(name)}. "
                    "Export the checkpoint again.",
                    path=file,
                )
    if missing := sorted(weight_map.keys() - seen.keys()):
        name = missing[0]
        raise ShardIndexError(
            f"{name}: the index of {folder} places it in {weight_map[name]}, which does not have it. "
            "Export the checkpoint again.",
            path=str(folder),
        )
