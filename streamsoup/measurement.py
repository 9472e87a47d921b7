"""What is measured of tensors, gathered from tiles that come in any order: the result is the same for any tiling.

Sums over blocks of `BLOCK_ELEMENTS` are added in the shape of a binary tree over the blocks' numbers; counts are whole
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from streamsoup.kernels.measuring import BINS, ROUNDS
from streamsoup.methods.protocol import Array, Gram, Measure, Products, Ranks, Sums

Numbers: TypeAlias = npt.NDArray[np.float64]


class Looks(Protocol):
    """What a device can find out about some elements of a tile: whole blocks, or whole rows. Results are numpy's.

    `begin`, `count`: which elements of the tile.
    """

    def gram(self, begin: int, count: int, centre: int | None) -> Numbers:
        """See `streamsoup.kernels.measuring.gram`; shape (blocks, checkpoints, checkpoints)."""
        ...

    def products(self, begin: int, count: int) -> Numbers:
        """See `streamsoup.kernels.measuring.products`; shape (blocks, checkpoints - 1)."""
        ...

    def sums(self, begin: int, count: int, function: Callable[[Any], Array]) -> Numbers:
        """Return the sums over blocks of what a function of `Values` returns, shape (rows, blocks)."""
        ...

    def counts(
        self, begin: int, count: int, function: Callable[[Any], Array], number: int, prefixes: npt.NDArray[np.uint32]
    ) -> npt.NDArray[np.int64]:
        """Return the histograms of what a function of `Values` returns, shape (rows, ranks, bins)."""
        ...


class TreeSum:
    """Σ of arrays with numbers 0, 1, 2 ..., in a shape that depends on how many there are alone.

    Notes
    -----
    Memory: an array for each level of the tree and gap between those that came.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], Numbers] = {}

    def add(self, index: int, value: Numbers, level: int = 0) -> None:
        """Take in the array of a number, or the sum of 2**level of them."""
        while (sibling := self._nodes.pop((level, index ^ 1), None)) is not None:
            value = sibling + value if index & 1 else value + sibling
            level, index = level + 1, index >> 1
        self._nodes[level, index] = value

    def add_run(self, first: int, values: Numbers) -> None:
        """Take in arrays with consecutive numbers, stacked: level by level, the same sums as one by one."""
        level = 0
        while len(values):
            if first & 1:
                self.add(first, values[0].copy(), level)
                first, values = first + 1, values[1:]
            if len(values) & 1:
                self.add(first + len(values) - 1, values[-1].copy(), level)
                values = values[:-1]
            values = values[::2] + values[1::2]
            first, level = first >> 1, level + 1

    def merge(self, other: TreeSum) -> None:
        """Take in all that another has."""
        for (level, index), value in other._nodes.items():
            self.add(index, value, level)

    def total(self) -> Numbers:
        """Return the sum, once all have come."""
        nodes = sorted(self._nodes.items(), key=lambda node: node[0][1] << node[0][0], reverse=True)
        found = nodes[0][1]
        for _, value in nodes[1:]:
            found = value + found
        return found


class SumPart:
    """What one tile adds to a `SumMeasurement`."""

    def __init__(self, measure: Gram | Sums | Products) -> None:
        self.tree = TreeSum()
        self.by_row = isinstance(measure, Sums) and measure.by_row
        self.is_gram = isinstance(measure, Gram)
        self._measure = measure

    def look(self, looks: Looks, begin: int, count: int, first_block: int) -> None:
        """Take in whole blocks."""
        if isinstance(self._measure, Gram):
            self.tree.add_run(first_block, looks.gram(begin, count, self._measure.centre))
        elif isinstance(self._measure, Products):
            self.tree.add_run(first_block, looks.products(begin, count))
        else:
            found = looks.sums(begin, count, self._measure.of)
            self.tree.add_run(first_block, np.ascontiguousarray(found.T))


class SumMeasurement:
    """Gathers `Gram`, `Sums` or `Products`, of one tensor or of several.

    Attributes
    ----------
    gathered : dict of tensor to TreeSum
        What was taken in so far; see `join_gathered`.
    """

    def __init__(self, measure: Gram | Sums | Products) -> None:
        self._measure = measure
        self.gathered: dict[int, TreeSum] = {}

    def part(self) -> SumPart:
        """Begin a tile."""
        return SumPart(self._measure)

    def merge(self, tensor: int, part: Any) -> None:
        """Take in a tile."""
        self.gathered.setdefault(tensor, TreeSum()).merge(part.tree)

    def turn(self) -> bool:
        """After all tiles: is another round needed?"""
        return False

    @property
    def result(self) -> Numbers:
        """The sums."""
        totals = [self.gathered[tensor].total() for tensor in sorted(self.gathered)]
        return np.array(sum(totals[1:], totals[0]))


class RankPart:
    """What one tile adds to a `RankMeasurement`."""

    def __init__(self, measure: Ranks, number: int, prefixes: npt.NDArray[np.uint32]) -> None:
        self.counts: npt.NDArray[np.int64] | int = 0
        self.by_row = self.is_gram = False
        self._measure = measure
        self._round = number, prefixes

    def look(self, looks: Looks, begin: int, count: int, first_block: int) -> None:
        """Take in whole blocks."""
        self.counts = self.counts + looks.counts(begin, count, self._measure.of, *self._round)


class RankMeasurement:
    """Searches order statistics by their bits: three rounds of counting, 11, 11 and 9 bits.

    Attributes
    ----------
    gathered : int64 array, shape (rows, ranks, bins), or 0
        Counts of this round so far; see `join_gathered`.
    """

    def __init__(self, measure: Ranks) -> None:
        self._measure = measure
        self._round = 0
        self._prefixes = np.zeros((len(measure.ranks), len(measure.ranks[0])), np.uint32)
        self._ranks = np.array(measure.ranks, np.int64)
        self.gathered: npt.NDArray[np.int64] | int = 0

    def part(self) -> RankPart:
        """Begin a tile."""
        return RankPart(self._measure, self._round, self._prefixes)

    def merge(self, tensor: int, part: Any) -> None:
        """Take in a tile."""
        self.gathered = self.gathered + part.counts

    def turn(self) -> bool:
        """After all tiles: is another round needed?"""
        upper, low = ROUNDS[self._round]
        below = np.cumsum(self.gathered, axis=-1)
        for place in np.ndindex(*self._ranks.shape):
            found = int(np.searchsorted(below[place], self._ranks[place], side="right"))
            found = min(found, (1 << (upper - low)) - 1)  # NaN in a checkpoint may leave fewer than were asked for
            self._ranks[place] -= below[place][found - 1] if found else 0
            self._prefixes[place] = (int(self._prefixes[place]) << (upper - low)) | found
        self.gathered = 0
        self._round += 1
        return self._round < len(ROUNDS)

    @property
    def result(self) -> Numbers:
        """The order statistics."""
        return self._prefixes.view(np.float32).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What is known of one tensor after one sweep.

    Attributes
    ----------
    gram : float64 array, shape (checkpoints, checkpoints)
        Inner products of the first checkpoint and of the differences of the others from it.
    varying : int
        Elements that are not the same in all checkpoints (but for the base).
    moved : int
        Elements in which a checkpoint differs from the first.
    conflicts : int
        Elements in which two checkpoints differ from the first in opposite directions.
    digests : uint64 array, shape (checkpoints,)
    nonfinite : int64 array, shape (checkpoints,)
    """

    gram: Numbers
    varying: int
    moved: int
    conflicts: int
    digests: npt.NDArray[np.uint64]
    nonfinite: npt.NDArray[np.int64]

    @staticmethod
    def of(totals: Numbers, digests: npt.NDArray[np.uint64], nonfinite: npt.NDArray[np.int64]) -> Surveyed:
        """Unpack what `streamsoup.kernels.measuring.survey` adds up to."""
        count = len(digests)
        rows, columns = _triangle(count)
        gram = np.empty((count, count))
        gram[rows, columns] = gram[columns, rows] = totals[:-3]
        varying, moved, conflicts = (int(n) for n in totals[-3:])
        return Surveyed(gram, varying, moved, conflicts, digests, nonfinite)


@lru_cache(4)
def _triangle(count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return np.tril_indices(count)


class SurveyPart:
    """What one tile adds to a `SurveyMeasurement`."""

    def __init__(self, checkpoints: int, *, based: bool) -> None:
        self.tree = TreeSum()
        self.based = based
        self.elements = 0
        self.digests = np.zeros(checkpoints, np.uint64)
        self.nonfinite = np.zeros(checkpoints, np.int64)

    def add(self, blocks: Numbers, first_block: int, elements: int) -> None:
        """Take in what was found of some blocks."""
        self.tree.add_run(first_block, blocks)
        self.elements += elements


class SurveyMeasurement:
    """Surveys several tensors in one sweep, and hands each over as soon as all of it was seen.

    Parameters
    ----------
    checkpoints : int
    based : bool
        The first is the base of the others, and not one of them.
    sizes : int64 array, shape (tensors,)
        Elements of each tensor.
    found : callable taking a tensor and a Surveyed
        One call at a time, in any order of tensors.

    Notes
    -----
    Memory: matrices of those tensors that are under way, about one for each worker.
    """

    def __init__(
        self,
        checkpoints: int,
        *,
        based: bool,
        sizes: npt.NDArray[np.int64],
        found: Callable[[int, Surveyed], None],
    ) -> None:
        self._checkpoints = checkpoints
        self._based = based
        self._sizes = sizes
        self._found = found
        self._open: dict[int, SurveyPart] = {}

    def part(self) -> SurveyPart:
        """Begin a tile."""
        return SurveyPart(self._checkpoints, based=self._based)

    def merge(self, tensor: int, part: Any) -> None:
        """Take in a tile."""
        whole = self._open.setdefault(tensor, part)
        if whole is not part:
            whole.tree.merge(part.tree)
            whole.elements += part.elements
            whole.digests += part.digests
            whole.nonfinite += part.nonfinite
        if whole.elements == self._sizes[tensor]:
            del self._open[tensor]
            self._found(tensor, Surveyed.of(whole.tree.total(), whole.digests, whole.nonfinite))

    def turn(self) -> bool:
        """After all tiles: is another round needed?"""
        return False

    @property
    def result(self) -> None:
        """Nothing: all was handed over."""


Part: TypeAlias = SumPart | RankPart | SurveyPart
Asking: TypeAlias = SumMeasurement | RankMeasurement
"""What a method asked for."""
Measurement: TypeAlias = Asking | SurveyMeasurement


def begin(measure: Measure) -> Asking:
    """Begin to measure."""
    return RankMeasurement(measure) if isinstance(measure, Ranks) else SumMeasurement(measure)


def join_gathered(one: Any, other: Any) -> Any:
    """Join what two processes gathered for the same measurement from different tiles: the same as one would have."""
    if not isinstance(one, dict):
        return one + other
    for tensor, tree in other.items():
        one.setdefault(tensor, TreeSum()).merge(tree)
    return one


def held_bytes(checkpoints: int) -> int:
    """Bytes that a measurement of so many checkpoints holds at most: histograms of two ranks, or a tree of matrices."""
    return int(8 * max(2 * checkpoints * BINS, checkpoints * checkpoints * _DEEPEST))


_DEEPEST = 40
"""Levels of a tree over all blocks of the largest tensor, and some gaps."""
