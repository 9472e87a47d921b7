"""SCE: select the elements that vary most, calculate each checkpoint's weight from them, erase minority signs.

δ are the differences from the base. Of the elements whose δ vary between checkpoints, the share ``select_topk`` with
the largest variance is selected; a checkpoint's weight is its mean δ² over them; elements whose sign is not that of
their sum are left out. Source: Wan et al. 2024, arXiv 2408.07990.

Tolerance against a dense float64 computation: 1e-14 of Σ|δ|; of equal variances (in float32) at the threshold all are
selected.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

from streamsoup.methods.base import MethodBase
from streamsoup.methods.parameters import Parameters
from streamsoup.methods.protocol import Array, Elementwise, Measure, Ranks, Rule, Sums, TensorInfo, Values


@dataclass(frozen=True, slots=True)
class Sce(MethodBase):
    """See the module; `count` checkpoints beside the base."""

    count: int
    parameters: Parameters

    name: ClassVar[str] = "sce"

    @property
    def sweeps(self) -> int:  # type: ignore[override]
        """See `Method`."""
        chosen = self.parameters.shared.get("select_topk", 1.0)
        return 2 if isinstance(chosen, int | float) and (chosen >= 1 or chosen <= 0) else 6

    def merge(self, tensor: TensorInfo, known: object) -> Generator[Measure, Any, Rule]:
        """See `Method`."""
        share = self.parameters.number("select_topk", tensor, 1.0)
        least = 0.0
        if 0 < share < 1:
            (varying,) = (yield Sums(lambda v: v.stack([1.0 * (_variance(v) > 0)]))).tolist()
            if (chosen := int(varying * share)) > 0:
                rank = tensor.elements - chosen
                ((least,),) = (yield Ranks(lambda v: v.stack([_variance(v)]), ((rank,),))).tolist()
            else:
                share = 0.0

        def selected(values: Values) -> Array:
            deltas = values.rows[1:] - values.rows[0]
            if share >= 1:
                return deltas
            variance = _variance(values)
            return values.where((variance >= least) & (variance > 0) & (share > 0), deltas, 0.0)

        sums = (yield Sums(lambda v: selected(v) ** 2)).tolist()
        total = sum(sums)
        small = total / max(tensor.elements, 1) < 1e-6
        weights = tuple(1 / self.count if small else one / total for one in sums)

        def of(values: Values) -> Array:
            deltas = selected(values)
            elected = values.where(values.total(deltas) >= 0, 1.0 + 0.0 * deltas[0], -1.0)
            factors = values.where(values.sign(deltas) == elected, values.column(weights) + 0.0 * deltas, 0.0)
            divisor = values.total(factors)
            return values.rows[0] + values.total(deltas * factors) / values.where(divisor > 1e-6, divisor, 1e-6)

        return Elementwise(of)


def _variance(values: Values) -> Array:
    """Of the differences from the base, between the checkpoints: population variance, as float32."""
    deltas = values.rows[1:] - values.rows[0]
    count = values.number(len(deltas))
    mean = values.total(deltas) / count
    return values.single(values.total((deltas - mean) ** 2) / count)
