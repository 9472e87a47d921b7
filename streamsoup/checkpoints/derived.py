"""Checkpoints whose tensors are computed of the bytes of others as these are read: adapters, scaled fp8, strides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints.beside import read_config
from streamsoup.checkpoints.protocol import Checkpoint, Shard
from streamsoup.checkpoints.table import TensorTable
from streamsoup.dtypes import DTYPES, DType
from streamsoup.errors import CheckpointError
from streamsoup.source import PartReader, Source

_FLOAT = np.array([d.is_float for d in DTYPES])


@dataclass(frozen=True)
class DerivedCheckpoint:
    """A `Checkpoint` that is computed of its parts, tile by tile. Inherit from it and give `derive`.

    Its parts are opened, identified and checked as ingredients are; what is computed must depend on nothing but their
    bytes, and have the same bits for any tiles.

    Attributes
    ----------
    path : str
    folder : Path or None
    parts : tuple of Checkpoint
        What is read. Their tables may list other tensors than this one's: factors, scales, pieces.
    table : TensorTable
        What comes out. `shards` and `begins` say near which bytes of the parts' shards, counted through, a tensor lies.
    metadata : mapping of str to str
    out_dtypes : uint8 array, shape (tensors,)
        What a soup of it is written as, where nothing is asked for: the dtypes that a person thinks it has.
    scratch_bytes : int
        What a thread holds at most while it computes, strips of its parts included.
    """

    path: str
    folder: Path | None
    parts: tuple[Checkpoint, ...]
    table: TensorTable
    metadata: Mapping[str, str]
    out_dtypes: npt.NDArray[np.uint8]
    scratch_bytes: int

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The files of all parts."""
        return tuple(shard for part in self.parts for shard in part.shards)

    @property
    def computes(self) -> bool:
        """Whether numbers are computed, and not only brought from other places, bit for bit."""
        return True

    @property
    def settled(self) -> npt.NDArray[np.bool_]:
        """Tensors that are written as `out_dtypes` says, whatever is asked for; shape (tensors,)."""
        return np.zeros(len(self.table), np.bool_)

    @property
    def settings(self) -> str:
        """What decides the numbers beside the bytes of the parts; it belongs to the identity."""
        return ""

    def prepare(self) -> None:
        """Compile what computes, or load it: memory that this takes is none of the engine's."""
        prepare_derived(self.parts)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of how it is computed, beside a soup of it; sentences without its path."""
        return remarks_of(self.parts)

    @property
    def left_out(self) -> frozenset[str]:
        """Files in the folder that are true of the stored numbers alone."""
        first = self.parts[0]
        return first.left_out if isinstance(first, DerivedCheckpoint) else frozenset()

    def configured(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Return what ``config.json`` has to say of this checkpoint, where the folder has the given one."""
        first = self.parts[0]
        return first.configured(document) if isinstance(first, DerivedCheckpoint) else dict(document)

    def derive(self, parts: Sequence[PartReader]) -> Source:
        """Return what computes the bytes of this checkpoint's tensors, and closes the parts when it is closed.

        `fetch` is always given a staging buffer.
        """
        raise NotImplementedError


def scratch_bytes_of(*checkpoints: Checkpoint) -> int:
    """What a thread holds at most while it computes all of these; it holds that beside what it makes of them."""
    return sum(c.scratch_bytes for c in checkpoints if isinstance(c, DerivedCheckpoint))


def out_dtypes_of(checkpoint: Checkpoint, dtype: DType | None = None) -> npt.NDArray[np.uint8]:
    """Return what a soup of a checkpoint is written as, shape (tensors,); `dtype`: what was asked for, of floats."""
    derived = checkpoint if isinstance(checkpoint, DerivedCheckpoint) else None
    found = checkpoint.table.dtypes if derived is None else derived.out_dtypes
    if dtype is None:
        return found
    asked = _FLOAT[found] if derived is None else _FLOAT[found] & ~derived.settled
    return np.where(asked, np.uint8(dtype.index), found).astype(np.uint8)


def is_computed(checkpoint: Checkpoint) -> bool:
    """Whether the numbers of a checkpoint are computed of what is stored."""
    return isinstance(checkpoint, DerivedCheckpoint) and checkpoint.computes


def prepare_derived(checkpoints: Iterable[Checkpoint]) -> None:
    """Load what computes the bytes of those that are computed."""
    for checkpoint in checkpoints:
        if isinstance(checkpoint, DerivedCheckpoint):
            checkpoint.prepare()


def remarks_of(checkpoints: Iterable[Checkpoint]) -> tuple[str, ...]:
    """Return what a person should know of how checkpoints are computed, each sentence once."""
    derived = (c for c in checkpoints if isinstance(c, DerivedCheckpoint))
    return tuple(dict.fromkeys(remark for checkpoint in derived for remark in checkpoint.remarks))


def notes_of(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Return what a person should know of a soup of checkpoints, the first of which lends it the files beside it."""
    first = checkpoints[0]
    gone = _settings_left_out(first) if isinstance(first, DerivedCheckpoint) else ()
    return (*remarks_of(checkpoints), *(f"{what} was left out." for what in gone))


def _settings_left_out(checkpoint: DerivedCheckpoint) -> Iterator[str]:
    """Yield what lies in the folder, and would not be true of a soup."""
    folder = checkpoint.folder
    if folder is None:
        return
    yield from (name for name in sorted(checkpoint.left_out) if (folder / name).is_file())
    try:
        document = json.loads(read_config(folder / "config.json")[0])
    except (CheckpointError, ValueError, RecursionError):  # none, or not JSON: there is nothing to change
        return
    if not isinstance(document, dict):
        return
    kept = set(_keys(checkpoint.configured(document)))
    yield from (f"{key} of config.json" for key in _keys(document) if key not in kept)


def _keys(document: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a configuration, and of that of its text model."""
    yield from document
    inner = document.get("text_config")
    yield from (f"text_config.{key}" for key in (inner if isinstance(inner, Mapping) else ()))


@dataclass(frozen=True)
class SelectedCheckpoint(DerivedCheckpoint):
    """Some tensors of a derived checkpoint, numbered or named anew."""

    positions: npt.NDArray[np.int64]

    @property
    def computes(self) -> bool:
        """See `DerivedCheckpoint`."""
        return is_computed(self.parts[0])

    @property
    def settled(self) -> npt.NDArray[np.bool_]:
        """See `DerivedCheckpoint`."""
        first = self.parts[0]
        assert isinstance(first, DerivedCheckpoint)
        return first.settled[self.positions]

    def derive(self, parts: Sequence[PartReader]) -> Source:
        """See `DerivedCheckpoint`."""
        return _Renumbered(parts[0].source, self.positions)


class _Renumbered(Source):
    """Passes on the bytes of tensors that have other numbers. See `Source`."""

    def __init__(self, source: Source, positions: npt.NDArray[np.int64]) -> None:
        self._source = source
        self._positions = positions

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        return self._source.fetch(int(self._positions[position]), offset, nbytes, staging)

    def load(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        self._source.load(int(self._positions[position]), offset, nbytes)

    def drop(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        self._source.drop(int(self._positions[position]), offset, nbytes)

    def close(self) -> None:
        """See `Source`."""
        self._source.close()
