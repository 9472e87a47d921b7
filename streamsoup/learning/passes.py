"""Going through the ingredients: to form the soup in a module, and for its gradient's inner products with each.

A group's inner products, the update of its coefficients and the forming of its tensors follow each other while its
bytes lie in the page cache: one reading. Only where a group is larger than the budget (as all tensors together mostly
are) its bytes are read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import Checkpoint, HeldCheckpoint
from streamsoup.engine import Engine
from streamsoup.errors import ChangedIngredientError, NonFiniteError
from streamsoup.findings import check_copied, check_finite
from streamsoup.learning.groups import Group
from streamsoup.learning.mixture import Numbers
from streamsoup.learning.network import Gradient
from streamsoup.measurement import SumMeasurement
from streamsoup.methods import Coefficients
from streamsoup.methods.protocol import Products
from streamsoup.outcome import Outcome
from streamsoup.plan import Plan
from streamsoup.pool import Pool
from streamsoup.read import Source
from streamsoup.sinks import Nowhere
from streamsoup.write import Sink

Update = Callable[[int, Numbers], Numbers]


class Passes:
    """Passes over some ingredients of a pool.

    Parameters
    ----------
    pool : Pool
    plan : Plan
        Of the soup, with half of the budget reserved.
    gradient_like : HeldCheckpoint
    groups : sequence of Group
    sources : sequence of Source
        One for each ingredient.
    sink : Sink
        Where the soup is formed.

    Attributes
    ----------
    parts : list of slice
        Groups that are updated together.
    bytes_read : int
        Of ingredients, so far.
    notes : list of str
        What was let through on request.
    """

    def __init__(
        self,
        pool: Pool,
        plan: Plan,
        gradient_like: HeldCheckpoint,
        groups: Sequence[Group],
        sources: Sequence[Source],
        sink: Sink,
    ) -> None:
        self._pool = pool
        self._plan = plan
        operands: list[Checkpoint] = [*plan.checkpoints, gradient_like]
        self._measuring = pool.plan_to_measure(operands, reserved_bytes=reserved_bytes(pool))
        self._groups = groups
        self._sources = sources
        self._sink = sink
        self.parts = join_groups(plan, groups)
        self.bytes_read = 0
        self.notes: list[str] = []
        self._digests: npt.NDArray[np.uint64] | None = None

    @property
    def projected_peak_bytes(self) -> int:
        """Bytes that are owned at most, beside module and gradient."""
        return sum(p.projected_peak_bytes - self._pool.budget_bytes // 2 for p in (self._plan, self._measuring))

    @property
    def varying_groups(self) -> int:
        """Groups in which the ingredients are not all the same; known after the first `form`."""
        assert self._digests is not None
        same = (self._digests == self._digests[0]).all(axis=0)
        equal = {tensor for tensor, is_same in zip(self._plan.averaged, same.tolist(), strict=True) if is_same}
        return sum(not equal.issuperset(group.tensors) for group in self._groups)

    def form(self, coefficients: Numbers) -> None:
        """Form the soup of some coefficients, shape (groups, ingredients): one reading.

        Raises
        ------
        MismatchError, NonFiniteError, ChangedIngredientError
        """
        engine = self._engine(self._plan, self._sources, self._sink)
        engine.run(self._plan.tiles(averaged=False))
        check_copied(self._plan, engine.outcome, self._pool.options.buffers)
        for part in self.parts:
            self._form(engine, part, coefficients[part], again=False)
        self._conclude(engine.outcome)

    def step(self, gradient: Gradient, update: Update) -> None:
        """Measure each part's inner products with a gradient, update its coefficients, and form its tensors.

        Parameters
        ----------
        gradient : Gradient
        update : callable taking the number of a part and its products, shape (groups, ingredients)
            Returns the coefficients to form, of the same shape.

        Raises
        ------
        NonFiniteError, ChangedIngredientError
        """
        looking = self._engine(self._measuring, [*self._sources, gradient], Nowhere())
        forming = self._engine(self._plan, self._sources, self._sink)
        for number, part in enumerate(self.parts):
            kept = is_kept(self._plan, self._groups, part)
            products = self._measure(looking, part, gradient, keep=kept)
            if not np.isfinite(products).all():
                raise NonFiniteError(
                    ["The gradient of the mixing coefficients is NaN or infinite."],
                    "Lower the learning rate, or look for what the loss divides by.",
                )
            self._form(forming, part, update(number, products), again=kept)
        self._conclude(forming.outcome)

    def _engine(self, plan: Plan, sources: Sequence[Source], sink: Sink) -> Engine:
        self._pool.prepare(measured=plan is self._measuring)
        return Engine(plan, self._pool.backend, sources, sink, progress=self._pool.progress)

    def _measure(self, engine: Engine, part: slice, gradient: Gradient, *, keep: bool) -> Numbers:
        found = np.zeros((part.stop - part.start, len(self._plan.checkpoints)))
        of_group: dict[int, SumMeasurement] = {}
        of_tensor: dict[int, SumMeasurement] = {}
        for row, group in enumerate(self._groups[part]):
            for tensor in group.tensors:
                if tensor in gradient and self._plan.table.elements[tensor]:
                    of_tensor[tensor] = of_group.setdefault(row, SumMeasurement(Products()))
        tiles = (tile for tensor in of_tensor for tile in self._measuring.tiles_of(tensor))
        engine.measure(tiles, of_tensor, keep=keep)
        self.bytes_read += sum(map(self._plan.bytes_of, of_tensor))
        for row, measurement in of_group.items():
            found[row] = measurement.result
        return found

    def _form(self, engine: Engine, part: slice, coefficients: Numbers, *, again: bool) -> None:
        rules = {
            tensor: numbers
            for group, row in zip(self._groups[part], coefficients, strict=True)
            for numbers in [Coefficients(tuple(row.tolist()))]
            for tensor in group.tensors
        }
        engine.run((tile for t in rules for tile in self._plan.tiles_of(t)), rules, again=again)

    def _conclude(self, formed: Outcome) -> None:
        self.notes = check_finite(self._plan, formed, self._pool.options.nonfinite) or self.notes
        self.bytes_read += formed.bytes_read
        averaged = formed.digests[:, self._plan.averaged]
        if self._digests is None:
            self._digests = averaged
        elif changed := np.flatnonzero((averaged != self._digests).any(axis=1)).tolist():
            raise ChangedIngredientError(
                f"{self._plan.checkpoints[changed[0]].path}: its data changed since it was first read. Put it back, or "
                "begin anew."
            )


def join_groups(plan: Plan, groups: Sequence[Group]) -> list[slice]:
    """Join groups while their bytes fit the budget: fewer sweeps, each with more to do."""
    sizes = [sum(plan.bytes_of(t) for t in group.tensors) for group in groups]
    parts, first, held = [], 0, 0
    for number, size in enumerate(sizes):
        if number > first and held + size > plan.budget_bytes:
            parts.append(slice(first, number))
            first, held = number, 0
        held += size
    return [*parts, slice(first, len(groups))]


def _bytes_of(plan: Plan, groups: Sequence[Group], part: slice) -> int:
    return sum(plan.bytes_of(t) for group in groups[part] for t in group.tensors)


def is_kept(plan: Plan, groups: Sequence[Group], part: slice) -> bool:
    """Whether what measuring read of a part is in the page cache when it is formed."""
    return not plan.staged and _bytes_of(plan, groups, part) <= plan.budget_bytes


def readings(plan: Plan, groups: Sequence[Group], part: slice) -> int:
    """Bytes that a step reads of a part."""
    return _bytes_of(plan, groups, part) * (1 if is_kept(plan, groups, part) else 2)


def reserved_bytes(pool: Pool) -> int:
    """What of the budget is not for forming, nor for measuring: the other's half, and the sums of each tensor."""
    checkpoints, tensors = len(pool.checkpoints), len(pool.first.table)
    return pool.budget_bytes // 2 + tensors * (16 * checkpoints + 500) // 2
