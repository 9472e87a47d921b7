"""The two plans of a step, and how its groups of tensors are joined into parts. Pure: from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from streamsoup.checkpoints import HeldCheckpoint, held_like
from streamsoup.dtypes import BY_NAME
from streamsoup.errors import BudgetError
from streamsoup.learning.groups import Group
from streamsoup.learning.job import LearnJob
from streamsoup.methods import Coefficients
from streamsoup.outcome import Progress
from streamsoup.plan import Plan
from streamsoup.pool import Pool
from streamsoup.units import format_binary

_AMPLE_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class Plans:
    """How the soup is formed and how the gradient is measured; each has half of the budget.

    Attributes
    ----------
    forming, measuring : Plan
        Over the ingredients; over the ingredients and the gradient.
    """

    forming: Plan
    measuring: Plan

    @property
    def projected_peak_bytes(self) -> int:
        """Bytes that are owned at most, beside module and gradient."""
        return sum(p.projected_peak_bytes - p.budget_bytes // 2 for p in (self.forming, self.measuring))


def open_pool(job: LearnJob, progress: Callable[[Progress], None] | None = None) -> tuple[Pool, Plans]:
    """Open the ingredients of a job, and plan.

    Raises
    ------
    CheckpointError, MismatchError
    BudgetError
        With the least budget that would do.
    """
    try:
        pool = Pool(job.ingredients, job.pool, progress)
        return pool, make_plans(job, pool)
    except BudgetError as error:
        ample = Pool(job.ingredients, replace(job.pool, budget_bytes=_AMPLE_BYTES))
        budget, least = job.pool.budget_bytes or 0, error.least_bytes
        while (more := _least(job, ample, least)) is not None:
            least = more
        raise BudgetError(
            f"A budget of {format_binary(budget)} is too small: the least that would do here is "
            f"{format_binary(least)}. Give --budget {format_binary(least).replace(' ', '')}.",
            least_bytes=least,
        ) from error


def _least(job: LearnJob, ample: Pool, budget_bytes: int) -> int | None:
    """Return a larger budget, if one is too small."""
    ample.budget_bytes = budget_bytes
    try:
        make_plans(job, ample)
    except BudgetError as error:
        return max(budget_bytes + 1, 2 * (error.least_bytes - budget_bytes // 2))
    return None


def make_plans(job: LearnJob, pool: Pool) -> Plans:
    """Plan, before the module is known: its gradient is taken to be of the widest dtype.

    Raises
    ------
    BudgetError
    """
    widest = np.where(pool.averaged, np.uint8(BY_NAME["F64"].index), pool.out_dtypes).astype(np.uint8)
    start = Coefficients(tuple(job.start.tolist()))
    forming = pool.plan(list(pool.checkpoints.values()), start, reserved_bytes=_reserved_bytes(pool), engines=2)
    return Plans(forming, plan_to_measure(pool, held_like(pool.first, widest, "the gradient")))


def plan_to_measure(pool: Pool, gradient: HeldCheckpoint) -> Plan:
    """Plan how the inner products of each ingredient with a gradient are measured.

    Raises
    ------
    BudgetError
    """
    both = [*pool.checkpoints.values(), gradient]
    return pool.plan_to_measure(both, reserved_bytes=_reserved_bytes(pool), engines=2)


def _reserved_bytes(pool: Pool) -> int:
    """What of the budget is not for forming, nor for measuring: the other's half, and the sums of each tensor."""
    checkpoints, tensors = len(pool.checkpoints), len(pool.first.table)
    return pool.budget_bytes - pool.budget_bytes // 2 + tensors * (16 * checkpoints + 500) // 2


def join_groups(plan: Plan, groups: Sequence[Group]) -> list[slice]:
    """Join groups while their bytes fit the budget: fewer sweeps, each with more to do."""
    sizes = [sum(plan.bytes_of(t) for t in group.tensors) for group in groups]
    parts, first, held = [], 0, 0
    for number, size in enumerate(sizes):
        if number > first and held + size > plan.budget_bytes:
            parts.append(slice(first, number))
            first, held = number, 0
        held += size
    return [*parts, slice(first, len(groups))]


def _bytes_of(plan: Plan, groups: Sequence[Group], part: slice) -> int:
    return sum(plan.bytes_of(t) for group in groups[part] for t in group.tensors)


def is_kept(plan: Plan, groups: Sequence[Group], part: slice) -> bool:
    """Whether what measuring read of a part is in the page cache when it is formed."""
    return not plan.staged and _bytes_of(plan, groups, part) <= plan.budget_bytes


def readings(plan: Plan, groups: Sequence[Group], part: slice) -> int:
    """Bytes that a step reads of a part."""
    return _bytes_of(plan, groups, part) * (1 if is_kept(plan, groups, part) else 2)
