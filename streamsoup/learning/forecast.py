"""What a learned soup will take, known before it begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from streamsoup.device_share import DeviceShare
from streamsoup.learning.groups import make_groups
from streamsoup.learning.job import LearnJob
from streamsoup.learning.plans import Plans, join_groups, readings
from streamsoup.pool import Pool


@dataclass(frozen=True, slots=True)
class LearnForecast:
    """What learning takes.

    Attributes
    ----------
    ingredients, groups, coefficients : int
        `coefficients`: that are free.
    bytes_of_ingredients : int
    readings_a_step : float
        How often they are read at each step.
    budget_bytes, projected_peak_bytes : int
        Beside the network, its gradient and activations.
    devices : tuple of DeviceShare
        What is taken of each device's memory.
    """

    ingredients: int
    groups: int
    coefficients: int
    bytes_of_ingredients: int
    readings_a_step: float
    budget_bytes: int
    projected_peak_bytes: int
    devices: tuple[DeviceShare, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def of(job: LearnJob, pool: Pool, plans: Plans) -> LearnForecast:
        """Forecast a job; a network that ties parameters may have fewer groups.

        Raises
        ------
        RecipeError
        """
        checkpoints = list(pool.checkpoints.values())
        plan = plans.forming
        groups = make_groups(job.by, plan.table.names, plan.averaged)
        swept = sum(readings(plan, groups, part) for part in join_groups(plan, groups))
        whole = sum(int(c.table.nbytes.sum()) for c in checkpoints)
        return LearnForecast(
            ingredients=len(checkpoints),
            groups=len(groups),
            coefficients=job.free(len(groups)),
            bytes_of_ingredients=whole,
            readings_a_step=swept / whole if whole else 0.0,
            budget_bytes=pool.budget_bytes,
            projected_peak_bytes=plans.projected_peak_bytes,
            devices=pool.backend.shares(plans.measuring.tiling, plans.measuring.needs),
        )
