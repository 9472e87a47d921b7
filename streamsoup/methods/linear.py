"""Fixed numbers for all tensors: uniform soups, weighted soups, plain coefficients.

Source: Wortsman et al. 2022, arXiv 2203.05482, "uniform soup"; weights generalise it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from streamsoup.errors import RecipeError
from streamsoup.methods.base import MethodBase
from streamsoup.methods.protocol import Coefficients, TensorInfo

# Below this share of Σ|w| the division amplifies rounding errors by more than a million.
SMALLEST_SUM = Fraction(1, 10**6)
# Outside this range sums of products might overflow float64 though their quotient does not.
_PLAIN_EXPONENTS = 100


@dataclass(frozen=True, slots=True)
class Linear(MethodBase):
    """The same coefficients for every tensor."""

    name: str
    numbers: Coefficients

    fixed = True

    def merge(self, tensor: TensorInfo, known: object) -> Coefficients:
        """Return the numbers; the tensor does not matter."""
        return self.numbers


@dataclass(frozen=True, slots=True)
class Convert(MethodBase):
    """One checkpoint as it is, or rounded once to another dtype."""

    name: str = "convert"

    fixed = True
    verbatim = True

    def merge(self, tensor: TensorInfo, known: object) -> Coefficients:
        """Return the number one."""
        return _ONE


_ONE = Coefficients((1.0,))


def linear(weights: Sequence[float], *, normalize: bool, name: str = "weighted") -> Linear:
    """Make a method of weights (divided by their exact sum; equal ones are ones) or coefficients (applied as given).

    Raises
    ------
    RecipeError
        If a number is not finite, or weights cancel so that dividing by their sum means nothing.
    """
    if not all(math.isfinite(w) for w in weights):
        raise RecipeError(f"Weights {list(weights)}: every weight must be a finite number.")
    if not normalize:
        return Linear(name, Coefficients(tuple(map(float, weights))))
    total = sum(map(Fraction, weights), Fraction(0))
    magnitude = sum((abs(Fraction(w)) for w in weights), Fraction(0))
    if magnitude == 0:
        raise RecipeError("All weights are zero. Give at least one ingredient a weight.")
    if abs(total) < magnitude * SMALLEST_SUM:
        raise RecipeError(
            f"The weights cancel: their sum is {float(total):g}, their magnitudes add up to {float(magnitude):g}. "
            "Change the weights, or give coefficients, which are not divided by their sum."
        )
    if all(w == weights[0] for w in weights):
        # Their mean: no product is rounded, so that what lies midway between two numbers of the output stays there.
        return Linear(name, Coefficients((1.0,) * len(weights), (float(len(weights)), 0.0)))
    scale = _power_of_two(max(abs(w) for w in weights))
    total *= scale
    high = float(total)
    scaled = tuple(float(Fraction(w) * scale) for w in weights)
    return Linear(name, Coefficients(scaled, (high, float(total - Fraction(high)))))


def _power_of_two(largest: float) -> Fraction:
    """Return a factor that brings extreme weights into range and changes no bit of the quotient."""
    exponent = math.frexp(largest)[1]
    return Fraction(1) if abs(exponent) <= _PLAIN_EXPONENTS else Fraction(2) ** -exponent
