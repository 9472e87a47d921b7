"""Coefficients that depend on no number of the checkpoints; they may depend on a tensor's name and depth.

Sources: Wortsman et al. 2022, arXiv 2203.05482 (soups); Wortsman et al. 2021, arXiv 2109.01903 (WiSE-FT); Ilharco et
al. 2022, arXiv 2212.04089 (task arithmetic).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from streamsoup.errors import RecipeError
from streamsoup.methods.base import MethodBase
from streamsoup.methods.linear import linear
from streamsoup.methods.parameters import Parameters
from streamsoup.methods.protocol import Coefficients, TensorInfo


@dataclass(frozen=True, slots=True)
class Fixed(MethodBase):
    """Coefficients from parameters.

    Attributes
    ----------
    name : str
    weights : tuple of float
        Of the ingredients, unless the parameter ``weight`` says otherwise.
    parameters : Parameters
    normalize : bool
    formula : callable taking a Fixed and a TensorInfo
        Returns weights for all checkpoints, and whether to divide by their sum.
    """

    name: str
    weights: tuple[float, ...]
    parameters: Parameters
    normalize: bool
    formula: Callable[[Fixed, TensorInfo], tuple[tuple[float, ...], bool]] = field(repr=False)
    _known: dict[Any, Coefficients] = field(default_factory=dict, compare=False, repr=False)

    fixed: ClassVar[bool] = True

    def merge(self, tensor: TensorInfo, known: object) -> Coefficients:
        """Return the numbers; equal ones are one object."""
        key = self.formula(self, tensor)
        if key not in self._known:
            self._known[key] = linear(key[0], normalize=key[1]).numbers
        return self._known[key]

    def weights_of(self, tensor: TensorInfo) -> tuple[float, ...]:
        """Weights of the ingredients for one tensor."""
        return self.parameters.numbers("weight", tensor, self.weights)


def weighted(method: Fixed, tensor: TensorInfo) -> tuple[tuple[float, ...], bool]:
    """Σ wθ, divided by Σ w if normalised."""
    return method.weights_of(tensor), method.normalize


def task_arithmetic(method: Fixed, tensor: TensorInfo) -> tuple[tuple[float, ...], bool]:
    """θ₀ + λ Σ w (θ − θ₀), with Σ w = 1 if normalised."""
    scale = method.parameters.number("lambda", tensor, 1.0)
    weights = method.weights_of(tensor)
    if method.normalize:
        total = sum(weights)
        scale /= total if abs(total) >= 1e-8 else 1.0
    weights = tuple(scale * w for w in weights)
    return (1.0 - sum(weights), *weights), False


def wise_ft(method: Fixed, tensor: TensorInfo) -> tuple[tuple[float, ...], bool]:
    """(1 − α) θ₀ + α θ."""
    if len(method.weights) != 1:
        raise RecipeError(f"Method wise_ft takes a base and one checkpoint, not {len(method.weights)}.")
    alpha = method.parameters.number("alpha", tensor, 0.5)
    return (1.0 - alpha, alpha), False


def passthrough(method: Fixed, tensor: TensorInfo) -> tuple[tuple[float, ...], bool]:
    """Σ of one: θ times ``scale``."""
    if len(method.weights) != 1:
        raise RecipeError(f"Method passthrough takes one checkpoint, not {len(method.weights)}.")
    return (method.parameters.number("scale", tensor, 1.0, 0),), False


def ema(method: Fixed, tensor: TensorInfo) -> tuple[tuple[float, ...], bool]:
    """The exponential moving average over checkpoints in the order of their steps: each β of what was, 1 − β of it."""
    decay = method.parameters.number("decay", tensor, 0.9)
    if not 0 <= decay < 1:
        raise RecipeError(f"decay: {decay:g} is not in [0, 1).")
    last = len(method.weights) - 1
    return tuple((1 - decay if k else 1.0) * decay ** (last - k) for k in range(last + 1)), True
