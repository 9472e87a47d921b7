"""Are the tiles that an interrupted run finished still those of its ingredients?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from streamsoup.backends.protocol import Backend
from streamsoup.checkpoints import Checkpoint
from streamsoup.errors import ChangedIngredientError
from streamsoup.journal import TileRecord
from streamsoup.plan import Plan
from streamsoup.source import Source
from streamsoup.tiling import BLOCK_ELEMENTS


def written_again(checkpoint: Checkpoint, identity: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a shard has another inode or time of writing than was written down, though its samples may agree."""
    return any(
        (shard.inode, shard.mtime_ns) != (then["inode"], then["mtime_ns"])
        for shard, then in zip(checkpoint.shards, identity, strict=True)
    )


def recheck(plan: Plan, ingredient: int, source: Source, backend: Backend, records: Iterable[TileRecord]) -> None:
    """Read what was read of an ingredient once more and compare digests.

    Raises
    ------
    ChangedIngredientError
        If a tile is not what it was: a soup of it and of the rest would be a mixture of two files.

    Notes
    -----
    Memory: one tile of the ingredient, read in the plan's tile size whatever the interrupted run's was.
    """
    for record in records:
        dtype = plan.in_dtype(ingredient, record.tensor)
        position = plan.alignment.position(ingredient, record.tensor)
        step = plan.tiling.tile_elements
        staging = np.empty(step * dtype.itemsize, np.uint8) if plan.staged else None
        found = 0
        for start in range(record.start, record.start + record.elements, step):
            nbytes = min(step, record.start + record.elements - start) * dtype.itemsize
            room = None if staging is None else staging[:nbytes].data
            address = source.fetch(position, start * dtype.itemsize, nbytes, room)
            found += backend.digest(address, nbytes, dtype.itemsize, start // BLOCK_ELEMENTS)
        if found % 2**64 != int(record.digests[ingredient]):
            checkpoint = plan.checkpoints[ingredient]
            raise ChangedIngredientError(
                f"{plan.table.names[record.tensor]}: its data in {checkpoint.path} changed since the work began. Put "
                "the old file back, or begin anew with --restart."
            )
