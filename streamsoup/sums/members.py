"""What a running sum is the sum of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from streamsoup.errors import RecipeError
from streamsoup.methods import Coefficients, linear

# Weights beyond 2^±100 might overflow a sum whose quotient does not.
_LARGEST_EXPONENT = 100


@dataclass(frozen=True, slots=True)
class Member:
    """An ingredient in a sum, with its merged weight."""

    path: str
    weight: float


def merge(members: Sequence[Member], path: str, weight: float) -> tuple[Member, ...]:
    """Add weight to a member (a new one comes last); one whose weight becomes zero goes.

    Raises
    ------
    RecipeError
        If the weight would become negative.
    """
    merged = {m.path: m.weight for m in members}
    merged[path] = merged.get(path, 0.0) + weight
    if merged[path] < 0:
        raise RecipeError(f"{path}: only {merged[path] - weight:g} of it can be removed, not {-weight:g}.")
    return tuple(Member(p, w) for p, w in merged.items() if w)


def divisor_of(members: Sequence[Member]) -> tuple[float, float]:
    """Sum of the weights, as hi + lo."""
    total = sum((Fraction(m.weight) for m in members), Fraction(0))
    high = float(total)
    return high, float(total - Fraction(high))


def numbers_of(members: Sequence[Member]) -> Coefficients:
    """Coefficients of their soup, which are those of the recipe."""
    return linear([m.weight for m in members], normalize=True).numbers


def is_multiple(members: Sequence[Member]) -> bool:
    """Whether their sum holds multiples of what their soup adds, since equal weights are ones there.

    With powers of two the bits are the same.
    """
    weights = tuple(m.weight for m in members)
    return numbers_of(members).weights != weights and math.frexp(weights[0])[0] != 0.5


def checked_weight(weight: float) -> float:
    """Return a weight that a running soup takes.

    Raises
    ------
    RecipeError
    """
    if not math.isfinite(weight) or weight <= 0 or abs(math.frexp(weight)[1]) > _LARGEST_EXPONENT:
        raise RecipeError(f"Weight {weight!r}: a running soup takes positive weights between 2^-100 and 2^100.")
    return float(weight)
