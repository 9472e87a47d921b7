"""A checkpoint whose bytes are in memory, or in a store of ours: a running sum, the gradient of a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints.protocol import Checkpoint, Shard
from streamsoup.checkpoints.table import TensorTable


@dataclass(frozen=True)
class HeldCheckpoint:
    """Names, shapes and dtypes without files. See `Checkpoint`.

    Attributes
    ----------
    path : str
        What it is, in words.
    """

    table: TensorTable
    path: str
    folder: Path | None = None
    shards: tuple[Shard, ...] = ()

    @property
    def metadata(self) -> Mapping[str, str]:
        """No free text."""
        return {}


def held_like(like: Checkpoint, dtypes: npt.NDArray[np.uint8], what: str) -> HeldCheckpoint:
    """Describe something held with the names and shapes of a checkpoint, and dtypes of its own."""
    table = like.table
    own = TensorTable(table.names, dtypes, table.dims, table.dim_starts, table.shards, table.begins)
    return HeldCheckpoint(own, what)
