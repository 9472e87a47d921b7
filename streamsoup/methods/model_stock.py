"""Model Stock: between the mean of the checkpoints and the base, as far as their directions agree.

With K checkpoints, δ their differences from the base and c the cosine between two of them: t = Kc / (1 + (K − 1)c), and
the result is t · mean + (1 − t) · base, for each tensor. Source: Jang et al. 2024, arXiv 2403.19522.

Publications differ in which c. ``cosine: moments`` (here the default) is the ratio of expectations that the paper's
geometry has, the mean ⟨δᵢ, δⱼ⟩ over the mean ‖δᵢ‖²: Σ‖δᵢ‖² and ‖Σδᵢ‖² tell it without a Gram matrix. ``cosine: pairs``
is the mean of the cosines of all pairs, as mergekit has it. With ``filter_wise``, each row has its own.

Tolerance against a dense float64 computation: t to 1e-12.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import numpy as np

from streamsoup.errors import RecipeError
from streamsoup.methods.base import MethodBase
from streamsoup.methods.parameters import Parameters
from streamsoup.methods.protocol import (
    Array,
    Coefficients,
    Elementwise,
    Gram,
    Measure,
    Rule,
    Sums,
    TensorInfo,
    Values,
)

_MOST_PAIRED = 12


@dataclass(frozen=True, slots=True)
class ModelStock(MethodBase):
    """See the module; `count` is K."""

    count: int
    parameters: Parameters

    name: ClassVar[str] = "model_stock"
    sweeps: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.count < 2:
            raise RecipeError("Method model_stock takes a base and at least two checkpoints.")
        self.parameters.word("cosine", "moments", ("moments", "pairs"))

    def merge(self, tensor: TensorInfo, known: object) -> Generator[Measure, Any, Rule]:
        """See `Method`."""
        count = self.count
        if self.parameters.value("cosine", tensor, "moments") == "moments":
            sums = yield Sums(_moments)
            own = float(sums[:-1].sum())
            cosine = (float(sums[-1]) - own) / ((count - 1) * own) if own else 0.0
        else:
            gram = (yield Gram(centre=0))[1:, 1:]
            norms = np.sqrt(np.diag(gram))
            with np.errstate(all="ignore"):
                cosines = np.clip(gram / np.maximum(np.outer(norms, norms), 1e-6), -1, 1)
            cosine = float(cosines[np.triu_indices(count, 1)].mean())
        divisor = 1 + (count - 1) * cosine
        t = 0.0 if abs(divisor) < 1e-6 else count * cosine / divisor
        return Coefficients((1 - t, *[t / count] * count))


def _moments(values: Values) -> Array:
    deltas = values.rows[1:] - values.rows[0]
    together = values.total(deltas)
    return values.stack([*(deltas * deltas), together * together])


@dataclass(frozen=True, slots=True)
class FilterwiseModelStock(ModelStock):
    """Model Stock of each row of a tensor by itself."""

    sweeps: ClassVar[int] = 1
    by_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ModelStock.__post_init__(self)
        if self._pairs and self.count > _MOST_PAIRED:
            raise RecipeError(
                f"filter_wise with the cosines of all pairs takes at most {_MOST_PAIRED} checkpoints, not "
                f"{self.count}. Give cosine moments."
            )

    @property
    def _pairs(self) -> bool:
        return bool(self.parameters.word("cosine", "moments", ("moments", "pairs")) == "pairs")

    def merge(self, tensor: TensorInfo, known: object) -> Rule:  # type: ignore[override]
        """See `Method`."""
        count = self.count

        def of(values: Values) -> Array:
            deltas = values.rows[1:] - values.rows[0]
            cosine = _cosine_of_pairs(values, deltas) if self._pairs else _cosine_of_moments(values, deltas)
            divisor = 1 + (count - 1) * cosine
            singular = abs(divisor) < 1e-6
            t = values.where(
                singular, 0.0 * cosine, count * cosine / values.where(singular, 1.0 + 0.0 * cosine, divisor)
            )
            return t * (values.total(values.rows[1:]) / values.number(count)) + (1 - t) * values.rows[0]

        return Elementwise(of, by_row=True)


def _cosine_of_pairs(values: Values, deltas: Array) -> Array:
    norms = [values.sqrt(values.row_dot(delta, delta)) for delta in deltas]
    cosines = []
    for i, j in combinations(range(len(norms)), 2):
        product = norms[i] * norms[j]
        product = values.where(product > 1e-6, product, 1e-6)
        cosines.append((values.row_dot(deltas[i], deltas[j]) / product).clip(-1, 1))
    return values.total(cosines) / values.number(len(cosines))


def _cosine_of_moments(values: Values, deltas: Array) -> Array:
    together = values.total(deltas)
    own = values.total([values.row_dot(delta, delta) for delta in deltas])
    least = values.where(own > 0, own, 1.0 + 0.0 * own)
    return (values.row_dot(together, together) - own) / (values.number(len(deltas) - 1) * least)
