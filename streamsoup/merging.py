"""Measure, then combine: leads a method over all tensors, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from streamsoup.asked import Asked
from streamsoup.engine import Engine
from streamsoup.measurement import Asking, join_gathered
from streamsoup.outcome import Outcome
from streamsoup.plan import Plan, Tile
from streamsoup.ranks import ALONE, Ranks


def copy_all(
    plan: Plan, engine: Engine, done: Mapping[int, Sequence[tuple[int, int]]] | None = None, ranks: Ranks = ALONE
) -> Outcome:
    """Copy all tensors of a plan that are not averaged, but for what is done; each rank its share."""
    return engine.run(share(ranks, plan, lambda: plan.tiles(averaged=False, done=done)))


def reduce_all(
    plan: Plan, engine: Engine, done: Mapping[int, Sequence[tuple[int, int]]] | None = None, ranks: Ranks = ALONE
) -> Outcome:
    """Combine all averaged tensors of a plan, but for what is done; each rank its share.

    Where a method must look at a tensor first, it is gone through several times: while it lies in the page cache, or
    in a tile, if it fits the budget.
    """
    done = done or {}
    if plan.method.fixed:
        return engine.run(share(ranks, plan, lambda: plan.tiles(averaged=True, done=done)))
    if engine.work.known is None:
        look_at_all(plan, engine, ranks)
    for batch in plan.batches(done):
        _reduce_batch(plan, engine, batch, done, ranks)
    return engine.outcome


def look_at_all(plan: Plan, engine: Engine, ranks: Ranks = ALONE) -> None:
    """Measure what the method wants of all tensors together, before any is combined."""
    tensors = [t for t in plan.averaged if plan.method.takes(plan.table.names[t])]
    known = Asked(plan.method.whole([plan.info(t) for t in tensors]))
    while known.wants:
        tiles = share(ranks, plan, lambda: _tiles(plan, tensors, {}))
        engine.measure(tiles, dict.fromkeys(tensors, known.measurement), keep=False)
        _join(ranks, [known.measurement])
        known.turn()
    engine.work.known = known.value


def reduce_tensor(plan: Plan, engine: Engine, tensor: int, *, others: Sequence[tuple[int, int]] = ()) -> Outcome:
    """Combine or copy one tensor.

    Parameters
    ----------
    plan : Plan
    engine : Engine
    tensor : int
    others : sequence of (start, elements)
        Ranges that are not wanted, where nothing is measured first.
    """
    if plan.method.fixed or not plan.is_averaged(tensor):
        return engine.run(plan.tiles_of(tensor, others))
    _reduce_batch(plan, engine, [tensor], {}, ALONE)
    return engine.outcome


def _reduce_batch(
    plan: Plan, engine: Engine, batch: Sequence[int], done: Mapping[int, Sequence[tuple[int, int]]], ranks: Ranks
) -> None:
    # What lies in one tile is measured by the worker that has it, at once; but not what an earlier run did a part of.
    several = [t for t in batch if done.get(t) or not plan.is_one_tile(t)]
    asked = {t: Asked(plan.method.merge(plan.info(t), engine.work.known)) for t in several}
    kept = not plan.staged and all(plan.bytes_of(t) <= plan.budget_bytes for t in several)
    swept = False
    while wanting := [t for t in several if asked[t].wants]:
        measurements = {t: asked[t].measurement for t in wanting}
        tiles = _part_of_each(ranks, plan, _tiles(plan, wanting, {}))
        engine.measure(tiles, measurements, again=swept and kept, keep=kept)
        _join(ranks, list(measurements.values()))
        for tensor in wanting:
            asked[tensor].turn()
        swept = True
    rules = {t: rule for t in several if (rule := asked[t].rule) is not None}
    if several:
        engine.run(_part_of_each(ranks, plan, _tiles(plan, several, done)), rules, again=swept and kept)
    if len(several) < len(batch):
        rest = [t for t in batch if t not in set(several)]
        engine.run(share(ranks, plan, lambda: _tiles(plan, rest, done)), rules)


def _tiles(plan: Plan, tensors: Sequence[int], done: Mapping[int, Sequence[tuple[int, int]]]) -> Iterator[Tile]:
    for tensor in tensors:
        yield from plan.tiles_of(tensor, done.get(tensor, ()))


def share(ranks: Ranks, plan: Plan, tiles: Callable[[], Iterable[Tile]]) -> Iterator[Tile]:
    """Yield a rank's share of tiles: of as many bytes as the others', and one after the other in the files."""
    if ranks.count == 1:
        yield from tiles()
        return
    total, before = sum(_bytes(plan, tile) for tile in tiles()), 0
    for tile in tiles():
        size = _bytes(plan, tile)
        if (2 * before + size) * ranks.count // (2 * total) == ranks.number:
            yield tile
        before += size


def _bytes(plan: Plan, tile: Tile) -> int:
    return tile.elements * int(plan.bytes_each[tile.tensor])


def _part_of_each(ranks: Ranks, plan: Plan, tiles: Iterable[Tile]) -> Iterator[Tile]:
    """Yield tiles in a rank's part of each tensor, so that it combines what it has measured."""
    for tile in tiles:
        elements = int(plan.table.elements[tile.tensor])
        if (2 * tile.start + tile.elements) * ranks.count // (2 * elements) == ranks.number:
            yield tile


def _join(ranks: Ranks, measurements: Sequence[Asking]) -> None:
    """Make what each rank measured known to all."""
    if ranks.count == 1:
        return
    gathered = ranks.fold(
        lambda: [m.gathered for m in measurements],
        lambda one, other: [join_gathered(a, b) for a, b in zip(one, other, strict=True)],
    )
    for measurement, found in zip(measurements, gathered, strict=True):
        measurement.gathered = found
