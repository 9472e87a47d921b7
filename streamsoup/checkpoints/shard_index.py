"""Folders with several files of weights, and the index that says which tensor lies where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from streamsoup.errors import CheckpointNotFoundError, ShardIndexError

INDEX_SUFFIX = ".index.json"


def files_of(folder: Path, pattern: str) -> tuple[list[str], dict[str, str] | None]:
    """Find the files of a folder, and its weight map if it has an index.

    Parameters
    ----------
    folder : Path
    pattern : str
        Of the files, which end as ``*.safetensors`` does; their index has ``.index.json`` after that.

    Raises
    ------
    CheckpointNotFoundError, ShardIndexError
    """
    kind = pattern.rpartition("*")[2]
    indices = sorted(folder.glob(f"{pattern}{INDEX_SUFFIX}"))
    files = sorted(folder.glob(pattern))
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
            f"{folder}: no {kind} file in this folder. Name a checkpoint folder or file.",
            path=str(folder),
        )
    raise ShardIndexError(
        f"{folder}: {len(files)} {kind} files but no index. Name one of the files, or add the index.",
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


def check_index(folder: Path, weight_map: dict[str, str], files: list[str], names: Sequence[Sequence[str]]) -> None:
    """Check that every tensor lies where the index says.

    Parameters
    ----------
    folder : Path
    weight_map : dict of str to str
    files : list of str
    names : sequence of sequences of str
        The tensors of each file.

    Raises
    ------
    ShardIndexError
    """
    seen: dict[str, str] = {}
    for file, inside in zip(files, names, strict=True):
        shard = Path(file).name
        for name in inside:
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
