"""Measure, then combine: leads a method over all tensors, some at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from streamsoup.asked import Asked
from streamsoup.engine import Engine
from streamsoup.outcome import Outcome
from streamsoup.plan import Plan, Tile


def reduce_all(plan: Plan, engine: Engine, done: Mapping[int, Sequence[tuple[int, int]]] | None = None) -> Outcome:
    """Combine all averaged tensors of a plan, but for what is done.

    Where a method must look at a tensor first, it is gone through several times: while it lies in the page cache, or
    in a tile, if it fits the budget.
    """
    done = done or {}
    if plan.method.fixed:
        return engine.run(plan.tiles(averaged=True, done=done))
    tensors = [t for t in plan.averaged if plan.method.takes(plan.table.names[t])]
    known = Asked(plan.method.whole([plan.info(t) for t in tensors]))
    while known.wants:
        engine.measure(
            (tile for t in tensors for tile in plan.tiles_of(t)), dict.fromkeys(tensors, known.measurement), keep=False
        )
        known.turn()
    engine.work.known = known.value
    for batch in plan.batches(done):
        _reduce_batch(plan, engine, batch, done)
    return engine.outcome


def _reduce_batch(
    plan: Plan, engine: Engine, batch: Sequence[int], done: Mapping[int, Sequence[tuple[int, int]]]
) -> None:
    # What lies in one tile is measured by the worker that has it, at once; but not what an earlier run did a part of.
    several = [t for t in batch if done.get(t) or not plan.is_one_tile(t)]
    asked = {t: Asked(plan.method.merge(plan.info(t), engine.work.known)) for t in several}
    kept = not plan.staged and all(plan.bytes_of(t) <= plan.budget_bytes for t in several)
    swept = False
    while wanting := [t for t in several if asked[t].wants]:
        engine.measure(
            (tile for t in wanting for tile in plan.tiles_of(t)),
            {t: asked[t].measurement for t in wanting},
            again=swept and kept,
            keep=kept,
        )
        for tensor in wanting:
            asked[tensor].turn()
        swept = True
    rules = {t: rule for t in several if (rule := asked[t].rule) is not None}
    measured = set(several) if swept and kept else set()
    if measured:
        engine.run(_tiles(plan, several, done), rules, again=True)
    if len(measured) < len(batch):
        engine.run(_tiles(plan, [t for t in batch if t not in measured], done), rules)


def _tiles(plan: Plan, tensors: Sequence[int], done: Mapping[int, Sequence[tuple[int, int]]]) -> Iterator[Tile]:
    for tensor in tensors:
        yield from plan.tiles_of(tensor, done.get(tensor, ()))
