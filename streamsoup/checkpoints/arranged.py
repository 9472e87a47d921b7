"""Checkpoints whose tensors are numbered as those of another."""

from __future__ import annotations

import numpy as np

from streamsoup.checkpoints.protocol import Checkpoint
from streamsoup.checkpoints.safetensors import SafetensorsCheckpoint
from streamsoup.checkpoints.table import TensorTable


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
    return SafetensorsCheckpoint(checkpoint.path, checkpoint.folder, checkpoint.shards, arranged, checkpoint.metadata)
