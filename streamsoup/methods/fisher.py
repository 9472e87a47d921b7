"""Fisher-weighted averaging: Σ w F θ / Σ w F, with an importance F of every element of every checkpoint.

The importances lie in checkpoints of the same shapes (the diagonal of the Fisher information, say), not negative. Where
they are all zero, the element is the weighted mean. Source: Matena and Raffel 2021, arXiv 2111.09832.

Tolerance against a dense float64 computation: 1e-15 times the number of checkpoints, before the one rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from streamsoup.methods.base import MethodBase, refuse_cancelling
from streamsoup.methods.parameters import Parameters
from streamsoup.methods.protocol import Array, Elementwise, TensorInfo, Values


@dataclass(frozen=True, slots=True)
class Fisher(MethodBase):
    """See the module. Checkpoints are the ingredients, and after them their importances in the same order."""

    weights: tuple[float, ...]
    parameters: Parameters

    name: ClassVar[str] = "fisher"

    def merge(self, tensor: TensorInfo, known: object) -> Elementwise:
        """See `Method`."""
        numbers = self.parameters.numbers("weight", tensor, self.weights)
        refuse_cancelling(self.name, numbers)
        count = len(numbers)

        def of(values: Values) -> Array:
            weights = values.column(numbers)
            factors = values.rows[count:] * weights
            total = values.total(factors)
            nothing = total == 0
            factors = values.where(nothing, weights + 0.0 * factors, factors)
            return values.total(factors * values.rows[:count]) / values.where(
                nothing, sum(numbers) + 0.0 * total, total
            )

        return Elementwise(of)
