"""What tests of devices share: a small pool, and device budgets to the block."""

from __future__ import annotations

import numpy as np
from factory import realistic, write_checkpoint
from simmer import plan_for

from streamsoup.device_share import slot_bytes_on_device, working_bytes
from streamsoup.tiling import BLOCK_ELEMENTS

COUNT = 5


def write_runs(folder):
    shapes = {"a": (17, 1001), "b": (5 * BLOCK_ELEMENTS + 3,), "c": (40, 64), "d": (7,)}
    return [
        str(write_checkpoint(folder / f"run{i}", {**realistic(i, shapes, ("BF16", "F32")[i % 2]), "ids": np.arange(9)}))
        for i in range(COUNT)
    ]  # fmt: skip


def same(found, reference):
    return found.keys() == reference.keys() and all(found[k].tobytes() == reference[k].tobytes() for k in reference)


def budget_for(paths, blocks, **sizes):
    """A device budget for pieces of so many blocks, and no more."""
    plan = plan_for(paths, staged=True, locked=True, **sizes)
    piece = blocks * BLOCK_ELEMENTS
    slots = plan.tiling.workers * slot_bytes_on_device(plan.needs, plan.tiling, piece)
    return slots + working_bytes(plan.needs, plan.tiling, piece)
