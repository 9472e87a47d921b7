"""What every kind of ingredient offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from streamsoup.checkpoints.table import TensorTable


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint, as it was when it was opened.

    Attributes
    ----------
    path : str
    size_bytes, mtime_ns, inode : int
    header_sha256 : str
    """

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int
    header_sha256: str


class Checkpoint(Protocol):
    """Names, shapes, dtypes and byte ranges: all that the planner and the readers need.

    Attributes
    ----------
    path : str
        As the person gave it; used in messages.
    folder : Path or None
        Where configuration and tokenizer files lie, if it is a folder.
    shards : tuple of Shard
    table : TensorTable
        All tensors, ordered by shard and position.
    metadata : mapping of str to str
        The format's free text, of the first shard.
    """

    @property
    def path(self) -> str: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def shards(self) -> tuple[Shard, ...]: ...
    @property
    def table(self) -> TensorTable: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class StoredCheckpoint:
    """A `Checkpoint` whose tensors lie in files as they are: safetensors, or anything that was located in a file."""

    path: str
    folder: Path | None
    shards: tuple[Shard, ...]
    table: TensorTable
    metadata: Mapping[str, str]
