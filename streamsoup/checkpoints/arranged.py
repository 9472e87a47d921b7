"""A checkpoint whose tensors are numbered as those of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamsoup.checkpoints.protocol import Checkpoint, Shard
from streamsoup.checkpoints.table import TensorTable


@dataclass(frozen=True)
class ArrangedCheckpoint:
    """See `Checkpoint`; the files are as they were."""

    path: str
    folder: Path | None
    shards: tuple[Shard, ...]
    table: TensorTable
    metadata: Mapping[str, str]


def arranged_like(checkpoint: Checkpoint, like: Checkpoint) -> Checkpoint:
    """Number the tensors of a checkpoint as those of another, if both have the same names."""
    names, table = like.table.names, checkpoint.table
    if table.names == names or len(table.names) != len(names):
        return checkpoint
    positions = table.positions()
    if positions.keys() != set(names):
        return checkpoint
    order = np.array([positions[name] for name in names], np.int64)
    ranks = np.diff(table.dim_starts)[order]
    arranged = TensorTable(
        names=names,
        dtypes=table.dtypes[order],
        dims=np.concatenate([table.dims[:0], *(table.dims[slice(*table.dim_starts[i : i + 2])] for i in order)]),
        dim_starts=np.concatenate([[0], np.cumsum(ranks, dtype=np.int32)]).astype(np.int32),
        shards=table.shards[order],
        begins=table.begins[order],
    )
    return ArrangedCheckpoint(checkpoint.path, checkpoint.folder, checkpoint.shards, arranged, checkpoint.metadata)
