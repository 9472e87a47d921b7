"""The geometric median: the point with the least sum of distances to the checkpoints.

Found by Weiszfeld's iteration in the span of the checkpoints, from the Gram matrix of each tensor. A tensor counts as
one point. Source: Weiszfeld 1937; Pillutla et al. 2022, arXiv 1912.13445 (for aggregation, with a smoothed distance).

Tolerance against a dense float64 computation: coefficients to 1e-9.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from streamsoup.methods.base import MethodBase, refuse_cancelling
from streamsoup.methods.parameters import Parameters
from streamsoup.methods.protocol import Coefficients, Gram, Measure, Rule, TensorInfo


@dataclass(frozen=True, slots=True)
class GeometricMedian(MethodBase):
    """See the module.

    Attributes
    ----------
    weights : tuple of float
    parameters : Parameters
        ``max_iter`` (1000), ``tol`` (1e-12, of a coefficient), ``smoothing`` (1e-12 of the largest distance).
    """

    weights: tuple[float, ...]
    parameters: Parameters

    name: ClassVar[str] = "geometric_median"
    sweeps: ClassVar[int] = 2

    def merge(self, tensor: TensorInfo, known: object) -> Generator[Measure, Any, Rule]:
        """See `Method`."""
        refuse_cancelling(self.name, self.parameters.numbers("weight", tensor, self.weights))
        gram = yield Gram(centre=0)  # differences: fine-tunes of one network have nearly all in common
        weights = np.array(self.parameters.numbers("weight", tensor, self.weights))
        tolerance = self.parameters.number("tol", tensor, 1e-12)
        shares = weights / weights.sum()
        with np.errstate(all="ignore"):
            for _ in range(int(self.parameters.number("max_iter", tensor, 1000))):
                squares = np.diag(gram) - 2 * (gram @ shares) + shares @ gram @ shares
                distances = np.sqrt(np.maximum(squares, 0))
                least = self.parameters.number("smoothing", tensor, 1e-12) * distances.max()
                if not least > 0:
                    break  # all are equal
                pulls = weights / np.maximum(distances, least)
                before, shares = shares, pulls / pulls.sum()
                if np.abs(shares - before).max() <= tolerance:
                    break
        return Coefficients(tuple(shares.tolist()))
