"""Averages on a sphere, from the Gram matrix of a tensor: the result lies in the span of the checkpoints.

With a base, the vectors are differences from it, and it is added again; SLERP takes the checkpoints themselves. A
tensor counts as one vector. Sources: Shoemake 1985 (SLERP); Goddard et al. 2024, arXiv 2403.13257 (mergekit, whose
conventions these are: NuSLERP, multi-SLERP, the Karcher mean on the unit sphere times the mean norm).

Tolerance against a dense float64 computation: coefficients to 1e-12 of their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from streamsoup.errors import RecipeError
from streamsoup.methods.base import MethodBase, refuse_cancelling
from streamsoup.methods.parameters import Parameters
from streamsoup.methods.protocol import Array, Coefficients, Elementwise, Gram, Measure, Rule, TensorInfo, Values

Numbers: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spherical(MethodBase):
    """Coefficients from inner products.

    Attributes
    ----------
    name : str
    weights : tuple of float
    parameters : Parameters
    has_base : bool
        The first checkpoint is the base.
    formula : callable taking a Spherical, a Gram matrix of the vectors, and a TensorInfo
        Returns a coefficient for each vector.
    """

    name: str
    weights: tuple[float, ...]
    parameters: Parameters
    has_base: bool
    formula: Callable[[Spherical, Numbers, TensorInfo], Numbers] = field(repr=False)  # the name stands for it

    sweeps: ClassVar[int] = 2

    def merge(self, tensor: TensorInfo, known: object) -> Generator[Measure, Any, Rule]:
        """See `Method`."""
        if self.formula in (multislerp, karcher):
            refuse_cancelling(self.name, self.parameters.numbers("weight", tensor, self.weights))
        gram = yield Gram(centre=0 if self.has_base else None)
        with np.errstate(all="ignore"):
            if not self.has_base:
                return Coefficients(tuple(self.formula(self, gram, tensor).tolist()))
            found = self.formula(self, gram[1:, 1:], tensor)
            return Coefficients((float(1.0 - found.sum()), *found.tolist()))

    def shares(self, tensor: TensorInfo) -> Numbers:
        """Weights of the ingredients for one tensor, divided by their sum."""
        weights = np.array(self.parameters.numbers("weight", tensor, self.weights))
        return np.asarray(weights / weights.sum())


def slerp(method: Spherical, gram: Numbers, tensor: TensorInfo) -> Numbers:
    """Interpolate along the great circle from the first to the second; along the line where they are parallel."""
    t = method.parameters.number("t", tensor, 0.5)
    norms = np.sqrt(np.diag(gram))
    norms = np.where(norms > 1e-8, norms, 1.0)
    cosine = float(np.clip(gram[0, 1] / (norms[0] * norms[1]), -1, 1))
    if abs(cosine) > 0.9995:
        return np.array([1 - t, t])
    return _arc(t, cosine)


def nuslerp(method: Spherical, gram: Numbers, tensor: TensorInfo) -> Numbers:
    """SLERP whose place is the second's share of the weight, with a threshold for parallel vectors of 1e-16."""
    norms = np.maximum(np.sqrt(np.diag(gram)), 1e-7)
    cosine = float(np.clip(gram[0, 1] / (norms[0] * norms[1]), -1, 1))
    t = share_of_second(method, tensor)
    return np.array([1 - t, t]) if 1 - cosine**2 <= 1e-16 else _arc(t, cosine)


def share_of_second(method: Spherical, tensor: TensorInfo) -> float:
    """Second weight over both; one half where they cancel."""
    first, second = method.parameters.numbers("weight", tensor, method.weights)
    return 0.5 if abs(first + second) < 1e-6 else second / (first + second)


def _arc(t: float, cosine: float) -> Numbers:
    angle = math.acos(cosine)
    return np.array([math.sin((1 - t) * angle), math.sin(t * angle)]) / math.sin(angle)


def multislerp(method: Spherical, gram: Numbers, tensor: TensorInfo) -> Numbers:
    """Average in the tangent space at the normalised mean, and go back to the sphere of the mean norm."""
    if len(gram) == 1:
        return np.ones(1)
    weights = np.array(method.parameters.numbers("weight", tensor, method.weights))
    if method.parameters.flag("normalize_weights", True):
        weights = weights / weights.sum()
    norms = np.sqrt(np.diag(gram))
    units = gram / np.outer(norms + 1e-8, norms + 1e-8)  # inner products of unit vectors u
    length = math.sqrt(max(float(weights @ units @ weights), 0.0))
    if length < 1e-8:
        if len(gram) == 2:
            return weights
        raise RecipeError(
            f"{tensor.name}: the weighted sum of the directions is zero, so multislerp has no mean. Change the weights."
        )
    mean = weights / length  # coefficients of u
    dots = units @ mean
    tangent = weights - float(weights @ dots) * mean
    size = math.sqrt(max(float(tangent @ units @ tangent), 0.0)) + 1e-8
    on_sphere = math.cos(size) * mean + math.sin(size) / size * tangent
    return np.asarray(float(norms @ weights) * on_sphere / (norms + 1e-8))


def karcher(method: Spherical, gram: Numbers, tensor: TensorInfo) -> Numbers:
    """The point of the unit sphere with the least squared distances along it, times the mean norm."""
    tolerance = method.parameters.number("tol", tensor, 1e-5)
    most = int(method.parameters.number("max_iter", tensor, 10))
    norms = np.sqrt(np.diag(gram))
    valid = norms > tolerance
    if not valid.any() or len(gram) == 1:
        return np.ones(1) if len(gram) == 1 else np.zeros(len(gram))
    shares = method.shares(tensor)
    weights = np.where(valid, shares, 0.0)
    weights = weights / weights.sum()
    inverse = np.where(valid, 1 / np.where(valid, norms, 1.0), 0.0)
    units = gram * np.outer(inverse, inverse)
    length = math.sqrt(max(float(weights @ units @ weights), 0.0))
    mean = weights / length if length >= tolerance else np.eye(len(gram))[int(np.argmax(valid))]
    for _ in range(most):
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        factors = np.where(angles < tolerance, 0.0, weights * angles / np.where(angles < tolerance, 1, np.sin(angles)))
        tangent = factors - float(factors @ cosines) * mean
        size = math.sqrt(max(float(tangent @ units @ tangent), 0.0))
        if size < tolerance:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
        length = math.sqrt(max(float(mean @ units @ mean), 0.0))
        mean = mean / length if length > tolerance else mean
    return np.asarray(float(shares @ norms) * mean * inverse)


@dataclass(frozen=True, slots=True)
class RowNuslerp(Spherical):
    """NuSLERP of each row of a tensor by itself."""

    sweeps: ClassVar[int] = 1
    by_row: ClassVar[bool] = True

    def merge(self, tensor: TensorInfo, known: object) -> Rule:  # type: ignore[override]
        """See `Method`."""
        t = share_of_second(self, tensor)

        def arcs(cosines: Numbers) -> Numbers:
            parallel = 1 - cosines**2 <= 1e-16
            angles = np.arccos(np.where(parallel, 0.0, cosines))
            both = np.stack([np.sin((1 - t) * angles), np.sin(t * angles)]) / np.sin(angles)
            return np.where(parallel, np.array([[1 - t], [t]]), both)

        def of(values: Values) -> Array:
            rows = values.rows
            a, b = (rows[1] - rows[0], rows[2] - rows[0]) if self.has_base else (rows[0], rows[1])
            norms = [values.sqrt(values.row_dot(x, x)) for x in (a, b)]
            first, second = (values.where(norm > 1e-7, norm, 1e-7) for norm in norms)
            cosines = values.row_dot(a, b) / (first * second)
            factors = values.apply(arcs, cosines.clip(-1, 1))
            found = factors[0] * a + factors[1] * b
            return rows[0] + found if self.has_base else found

        return Elementwise(of, by_row=True)
