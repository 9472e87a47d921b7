"""Going through the ingredients: to form the soup in a module, and for its gradient's inner products with each.

A group's inner products, the update of its coefficients and the forming of its tensors follow each other while its
bytes lie in the page cache: one reading. Only where a group is larger than the budget (as all tensors together mostly
are) its bytes are read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from streamsoup.engine import Engine
from streamsoup.errors import ChangedIngredientError, MismatchError, NonFiniteError
from streamsoup.findings import check_copied, check_finite
from streamsoup.learning.groups import Group
from streamsoup.learning.mixture import Numbers
from streamsoup.learning.network import Gradient
from streamsoup.learning.plans import Plans, is_kept
from streamsoup.manifest import content_digests
from streamsoup.measurement import SumMeasurement
from streamsoup.methods import Coefficients
from streamsoup.methods.protocol import Products
from streamsoup.outcome import Outcome
from streamsoup.plan import Plan
from streamsoup.pool import Pool
from streamsoup.sinks import Nowhere
from streamsoup.source import Source
from streamsoup.write import Sink

Update = Callable[[int, Numbers], Numbers]


class Passes:
    """Passes over some ingredients of a pool.

    Parameters
    ----------
    pool : Pool
    plans : Plans
    groups : sequence of Group
    parts : sequence of slice
        Groups that are updated together.
    tied : mapping of int to int
        Tensors that go into the same parameter as an earlier one.
    sources : sequence of Source
        One for each ingredient.
    sink : Sink
        Where the soup is formed.

    Attributes
    ----------
    bytes_read : int
        Of ingredients, so far.
    notes : list of str
        What was let through on request.
    content_digests : list of str
        Of the ingredients; known after the first `form`.
    """

    def __init__(
        self,
        pool: Pool,
        plans: Plans,
        groups: Sequence[Group],
        parts: Sequence[slice],
        tied: Mapping[int, int],
        sources: Sequence[Source],
        sink: Sink,
    ) -> None:
        self._pool = pool
        self._plan = plans.forming
        self._measuring = plans.measuring
        self._groups = groups
        self._parts = parts
        self._tied = tied
        self._sources = sources
        self._sink = sink
        self.bytes_read = 0
        self.notes: list[str] = []
        self.content_digests: list[str] = []
        self._digests: npt.NDArray[np.uint64] | None = None

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
        for part in self._parts:
            self._form(engine, part, coefficients[part], again=False)
        if self._digests is None:
            self._refuse_unequal(engine.outcome)
            self.content_digests = content_digests(self._plan, engine.outcome.digests)
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
        for number, part in enumerate(self._parts):
            kept = is_kept(self._plan, self._groups, part)
            products = self._measure(looking, part, gradient, keep=kept)
            if not np.isfinite(products).all():
                raise NonFiniteError(
                    ["The gradient of the mixing coefficients is NaN or infinite."],
                    "Lower the learning rate, or look for what the loss divides by.",
                )
            self._form(forming, part, update(number, products), again=kept)
        self._conclude(forming.outcome)

    def _refuse_unequal(self, formed: Outcome) -> None:
        """Refuse tensors that go into one parameter and are not the same."""
        for tensor, first in self._tied.items():
            unequal = np.flatnonzero(formed.digests[:, tensor] != formed.digests[:, first])
            if len(unequal):
                names, path = self._plan.table.names, self._plan.checkpoints[int(unequal[0])].path
                raise MismatchError(
                    [f"{names[tensor]}: is the same parameter as {names[first]} in the module, but not in {path}."]
                )

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
