"""Runs the engine on checkpoints with every size chosen by hand: tiles, groups, threads, device, way of reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from factory import DTYPES

from streamsoup.backends import open_backend
from streamsoup.checkpoints import open_checkpoints
from streamsoup.dtypes import DTYPES as FORMAT_DTYPES
from streamsoup.engine import Engine
from streamsoup.errors import BudgetError
from streamsoup.execution import Execution
from streamsoup.methods import linear
from streamsoup.outcome import Outcome
from streamsoup.plan import Plan
from streamsoup.planner import make_plan
from streamsoup.read import open_sources
from streamsoup.recipe import make_recipe
from streamsoup.soup_plan import plan_soup
from streamsoup.tiling import BLOCK_ELEMENTS, slot_bytes
from streamsoup.write import Sink


class MemorySink(Sink):
    """Keeps the soup in memory, and checks that every byte is written exactly once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        sizes = [int(plan.table.elements[t]) * plan.out_dtype(t).itemsize for t in range(len(plan.table))]
        self.raw = [bytearray(size) for size in sizes]
        self.times = [np.zeros(size, np.uint8) for size in sizes]

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        self.raw[tensor][offset : offset + len(buffer)] = buffer
        self.times[tensor][offset : offset + len(buffer)] += 1

    def tensors(self) -> dict[str, np.ndarray]:
        assert all((times == 1).all() for times in self.times), "a byte was written twice or never"
        table = self.plan.table
        return {
            name: np.frombuffer(self.raw[t], DTYPES[self.plan.out_dtype(t).name]).reshape(table.shape(t))
            for t, name in enumerate(table.names)
        }


def plan_for(
    paths: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = True,
    dtype: str | None = None,
    tile_blocks: int = 4,
    group: int | None = None,
    workers: int = 2,
    staged: bool = False,
    ahead: bool = False,
    locked: bool = False,
) -> Plan:
    """Make a plan, and put a tiling of our own into it."""
    weights = [1.0] * len(paths) if weights is None else weights
    plan = make_plan(
        open_checkpoints([str(p) for p in paths]),
        linear(weights, normalize=normalize),
        dtype=dtype,
        shard_bytes=10**9,
        budget_bytes=10**9,
        workers=workers,
        staged=staged,
        ahead=ahead,
        locked=locked,
    )
    # Double-double sums never go in groups: see `TileNeeds`.
    group = min(group, len(paths)) if group and plan.needs.groupable else len(paths)
    tile = tile_blocks * BLOCK_ELEMENTS
    sizes = {"workers": workers, "tile_elements": tile, "group": group}
    tiling = dataclasses.replace(plan.tiling, **sizes, slot_bytes=slot_bytes(plan.needs, tile, group))
    return dataclasses.replace(plan, tiling=tiling)


def least_budget(paths: Sequence[str | Path], *, recipe: Mapping[str, Any] | None = None, **execution: object) -> int:
    """The smallest budget that is not refused: it forces one thread, small tiles, ingredients in groups."""
    made = make_recipe([str(p) for p in paths], **(recipe or {}))
    try:
        plan_soup(made, None, Execution(budget_bytes=1, **execution))  # type: ignore[arg-type]
    except BudgetError as error:
        return error.least_bytes
    raise AssertionError("a budget of one byte was taken")


def simmer(
    paths: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    device: str = "cpu",
    read_mode: str = "map",
    device_budget_bytes: int | None = None,
    **sizes: object,
) -> tuple[dict[str, np.ndarray], Outcome]:
    """Soup checkpoints into memory; return the tensors and what was found."""
    staged = read_mode == "plain" or device != "cpu"
    how = {"staged": staged, "ahead": read_mode == "ahead", "locked": device != "cpu"}
    plan = plan_for(paths, weights, **how, **sizes)  # type: ignore[arg-type]
    backend = open_backend(device, device_budget_bytes)
    dtypes = {FORMAT_DTYPES[i] for c in plan.checkpoints for i in set(c.table.dtypes.tolist())}
    dtypes |= {FORMAT_DTYPES[i] for i in set(plan.out_dtypes.tolist())}
    backend.prepare(wide=any(d.is_wide for d in dtypes), fp8=any(d.is_fp8 for d in dtypes))
    sink = MemorySink(plan)
    with open_sources(plan.checkpoints, read_mode) as sources:
        engine = Engine(plan, backend, sources, sink)
        engine.run(plan.tiles(averaged=False))
        outcome = engine.run(plan.tiles(averaged=True))
    return sink.tensors(), outcome
