"""Checkpoints with some of the tensors of another, in another order or under other names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints.derived import DerivedCheckpoint, SelectedCheckpoint
from streamsoup.checkpoints.live import LiveCheckpoint
from streamsoup.checkpoints.protocol import Checkpoint, StoredCheckpoint
from streamsoup.checkpoints.table import TensorTable


def select(
    checkpoint: Checkpoint,
    positions: npt.NDArray[np.int64],
    names: tuple[str, ...] | None = None,
    *,
    table: TensorTable | None = None,
) -> Checkpoint:
    """Pick tensors of a checkpoint, in this order.

    Parameters
    ----------
    checkpoint : Checkpoint
    positions : int64 array, shape (picked,)
    names : tuple of str, optional
        New names for them.
    table : TensorTable, optional
        What the same choice made of an equal table: checkpoints with equal headers go on sharing one.
    """
    table = checkpoint.table.take(positions, names) if table is None else table
    if isinstance(checkpoint, StoredCheckpoint):
        return replace(checkpoint, table=table)
    if isinstance(checkpoint, LiveCheckpoint):
        return checkpoint.take(positions, table)
    if not isinstance(checkpoint, DerivedCheckpoint):
        return StoredCheckpoint(checkpoint.path, checkpoint.folder, checkpoint.shards, table, checkpoint.metadata)
    return SelectedCheckpoint(
        path=checkpoint.path,
        folder=checkpoint.folder,
        parts=(checkpoint,),
        table=table,
        metadata=checkpoint.metadata,
        out_dtypes=checkpoint.out_dtypes[positions],
        scratch_bytes=checkpoint.scratch_bytes,
        positions=positions,
    )


def arranged_like(checkpoint: Checkpoint, like: Checkpoint) -> Checkpoint:
    """Number the tensors of a checkpoint as those of another, if both have the same names."""
    names, table = like.table.names, checkpoint.table
    if table.names == names or len(table.names) != len(names):
        return checkpoint
    positions = table.positions()
    if positions.keys() != set(names):
        return checkpoint
    return select(checkpoint, np.array([positions[name] for name in names], np.int64), names)
