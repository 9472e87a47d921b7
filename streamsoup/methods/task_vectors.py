"""Merges of differences from a base: thinned out, freed of conflicting signs, added.

θ₀ + λ Σ w · thin(δ), δ = θ − θ₀, with or without the election of one sign for each element. How δ is thinned:

* ``magnitude`` (TIES): the `density` largest |δ| of a tensor, or of the whole model (``scope: model``, the paper's)
* ``random`` (DARE): each element with probability `density`
* ``outliers`` (Breadcrumbs): not the `gamma` largest, then the largest up to `density`
* ``ranked`` (DELLA): each element with a probability from `density` − `epsilon` to `density` + `epsilon`, by the rank
  of its |δ| in its row

What is left is rescaled: not at all, by the reciprocal of the probability with which it was kept (``probability``, the
papers'), or so that Σ|δ| stays what it was (``l1``, as mergekit does). Random numbers depend on ``seed``, the
ingredient's number, the tensor's name and the element's place alone. Of equal |δ| at a threshold all are kept.

Sources: Yadav et al. 2023, arXiv 2306.01708 (TIES); Yu et al. 2023, arXiv 2311.03099 (DARE); Davari and Belilovsky
2023, arXiv 2312.06795 (Breadcrumbs); Deep et al. 2024, arXiv 2406.11617 (DELLA).

Tolerance against a dense float64 computation: 1e-14 of Σ|w δ|, before the one rounding to the output's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from streamsoup.errors import RecipeError
from streamsoup.methods.base import MethodBase
from streamsoup.methods.parameters import Parameters
from streamsoup.methods.protocol import Array, Elementwise, Measure, Ranks, Rule, Sums, TensorInfo, Values

RESCALES = ("none", "probability", "l1")


@dataclass(frozen=True, slots=True)
class TaskVectors(MethodBase):
    """See the module.

    Attributes
    ----------
    name : str
    weights : tuple of float
        Of the ingredients, without the base.
    parameters : Parameters
    thin : {"magnitude", "random", "outliers", "ranked"}
    elect : bool
        Elect a sign for each element, and leave out what has another.
    normalize : bool
        Divide by the sum of the weights that took part.
    rescale : {"none", "probability", "l1"}
    """

    name: str
    weights: tuple[float, ...]
    parameters: Parameters
    thin: str
    elect: bool
    normalize: bool
    rescale: str

    def __post_init__(self) -> None:
        settings = [source.get("density") for source in (self.parameters.shared, *self.parameters.each)]
        if self.of_model and any(isinstance(setting, list) for setting in settings):
            raise RecipeError("density: with scope model it is one number for all tensors.")

    @property
    def by_row(self) -> bool:  # type: ignore[override]
        """See `Method`."""
        return self.thin == "ranked"

    @property
    def of_model(self) -> bool:
        """Whether thresholds are those of the whole model."""
        return self.thin == "magnitude" and self.parameters.word("scope", "tensor", ("tensor", "model")) == "model"

    @property
    def sweeps(self) -> int:  # type: ignore[override]
        """See `Method`."""
        settings = [source.get("density", 1.0) for source in (self.parameters.shared, *self.parameters.each)]
        thins = any(not isinstance(setting, int | float) or setting < 1 for setting in settings)
        searches = thins and self.thin in ("magnitude", "outliers") and not self.of_model
        return 1 + 3 * searches + (self.rescale == "l1")

    @property
    def whole_sweeps(self) -> int:  # type: ignore[override]
        """See `Method`."""
        return 3 * self.of_model

    def whole(self, tensors: Sequence[TensorInfo]) -> Generator[Measure, Any, Any]:
        """Find the thresholds of the whole model, if they are wanted."""
        if not self.of_model or not tensors:
            return None
        count = sum(tensor.elements for tensor in tensors)
        everywhere = TensorInfo("", (count,))
        found = yield from self._thresholds(everywhere, self._numbers("density", everywhere, 1.0))
        return found

    def _numbers(self, name: str, tensor: TensorInfo, default: float) -> tuple[float, ...]:
        return self.parameters.numbers(name, tensor, (default,) * len(self.weights))

    def merge(self, tensor: TensorInfo, known: Any) -> Generator[Measure, Any, Rule]:
        """See `Method`."""
        weights = self.parameters.numbers("weight", tensor, self.weights)
        scale = self.parameters.number("lambda", tensor, 1.0)
        densities = self._numbers("density", tensor, 1.0)
        keep: Callable[[Values, Array], Array]
        if self.thin in ("magnitude", "outliers"):
            bounds = known if self.of_model else (yield from self._thresholds(tensor, densities))
            keep = partial(_between, bounds)
        else:
            epsilons = self._numbers("epsilon", tensor, 0.15) if self.thin == "ranked" else (0.0,) * len(weights)
            seed = int(self.parameters.number("seed", tensor, 0))
            keep = partial(self._by_chance, seed, _chances(densities, epsilons))

        def thinned(values: Values) -> Array:
            deltas = values.rows[1:] - values.rows[0]
            return values.where(keep(values, deltas), deltas, 0.0)

        factors = (1.0,) * len(weights)
        if self.rescale == "l1":
            sums = yield Sums(lambda v: v.stack([*abs(v.rows[1:] - v.rows[0]), *abs(thinned(v))]), by_row=self.by_row)
            before, after = sums[: len(weights)].tolist(), sums[len(weights) :].tolist()
            factors = tuple(b / a if min(b, a) >= 1e-7 else 1.0 for b, a in zip(before, after, strict=True))
        elif self.rescale == "probability" and self.thin != "ranked":
            factors = tuple(1 / d if 0 < d < 1 else 1.0 for d in densities)

        def of(values: Values) -> Array:
            deltas = thinned(values) * values.column(factors)
            if self.rescale == "probability" and self.thin == "ranked":
                chances = _probabilities(values, values.rows[1:] - values.rows[0], densities, epsilons)
                deltas = deltas / values.where(chances > 0, chances, 1.0)
            return values.rows[0] + scale * self._mixed(values, deltas * values.column(weights), weights)

        return Elementwise(of, by_row=self.by_row)

    def _mixed(self, values: Values, deltas: Array, weights: Sequence[float]) -> Array:
        if not self.elect:
            total = sum(weights)
            mixed = values.total(deltas)
            return mixed / values.number(total) if self.normalize and abs(total) >= 1e-8 else mixed
        elected = values.where(values.total(deltas) >= 0, 1.0 + 0.0 * deltas[0], -1.0)
        agrees = values.sign(deltas) == elected
        mixed = values.total(values.where(agrees, deltas, 0.0))
        if not self.normalize:
            return mixed
        divisor = values.total(values.where(agrees, values.column(tuple(weights)) + 0.0 * deltas, 0.0))
        return mixed / values.where(divisor == 0, 1.0 + 0.0 * divisor, divisor)

    def _thresholds(
        self, tensor: TensorInfo, densities: Sequence[float]
    ) -> Generator[Measure, Any, tuple[tuple[float, float], ...]]:
        """Return the least and largest |δ| that each ingredient keeps."""
        count = tensor.elements
        gammas = self._numbers("gamma", tensor, 0.01)
        places = [self._places(count, d, g) for d, g in zip(densities, gammas, strict=True)]
        found = None
        if any(place is not None and place != (0, count - 1) for place in places):
            several = any(place is not None and place[1] != count - 1 for place in places)
            ranks = tuple((place or (0, 0))[: 1 + several] for place in places)
            found = yield Ranks(lambda v: abs(v.rows[1:] - v.rows[0]), ranks)
        bounds = []
        for i, place in enumerate(places):
            if place is None:
                bounds.append((float("inf"), -float("inf")))
            else:
                low = 0.0 if place[0] == 0 or found is None else float(found[i, 0])
                high = float("inf") if place[1] == count - 1 or found is None else float(found[i, 1])
                bounds.append((low, high))
        return tuple(bounds)

    def _places(self, count: int, density: float, gamma: float) -> tuple[int, int] | None:
        """First and last rank that is kept, in ascending order; None: nothing is."""
        if density >= 1:
            return 0, count - 1
        if self.thin == "magnitude":
            return (count - max(1, int(density * count)), count - 1) if density > 0 else None
        kept = int(density * count)
        lowest = max(0, count - kept - int(gamma * count))
        return (lowest, lowest + kept - 1) if kept > 0 else None

    def _by_chance(self, seed: int, chances: Callable[[Values, Array], Array], values: Values, deltas: Array) -> Array:
        return values.uniform(seed, len(self.weights)) < chances(values, deltas)


def _between(bounds: Sequence[tuple[float, float]], values: Values, deltas: Array) -> Array:
    sizes = values.single(abs(deltas))
    low, high = (values.column(numbers) for numbers in zip(*bounds, strict=True))
    return (sizes >= low) & (sizes <= high)


def _chances(densities: Sequence[float], epsilons: Sequence[float]) -> Callable[[Values, Array], Array]:
    for density, epsilon in zip(densities, epsilons, strict=True):
        if epsilon and 0 < density < 1 and (density <= epsilon or density + epsilon >= 1):
            raise RecipeError(
                f"epsilon: {epsilon:g} beside a density of {density:g}; density - epsilon and density + epsilon must "
                "lie between 0 and 1."
            )
    return lambda values, deltas: _probabilities(values, deltas, densities, epsilons)


def _probabilities(values: Values, deltas: Array, densities: Sequence[float], epsilons: Sequence[float]) -> Array:
    """Chance of each element to be kept."""
    low = values.column(tuple(d - e if 0 < d < 1 else d for d, e in zip(densities, epsilons, strict=True)))
    if not any(epsilons):
        return low
    spread = values.column(tuple(2 * e if 0 < d < 1 else 0.0 for d, e in zip(densities, epsilons, strict=True)))
    return low + values.row_ranks(abs(deltas)) / values.number(max(values.tensor.width - 1, 1)) * spread
