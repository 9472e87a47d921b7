"""Sorts flat options into the values that a greedy job is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from streamsoup.checkpoints import pinned_path
from streamsoup.errors import RecipeError
from streamsoup.greedy_job import GreedyJob
from streamsoup.pool import PoolOptions
from streamsoup.rules import Rule

_OF_JOB = ("own_scores", "metric", "also", "timeout_seconds", "candidates", "overwrite", "jobs")
# What decides nothing, and may differ when a run goes on.
_MAY_CHANGE = {"timeout_seconds", "candidates", "overwrite", "jobs"}
_MAY_CHANGE_OF_POOL = {"budget_bytes", "device", "device_budget_bytes", "workers", "read_mode", "nonfinite"}


def make_job(
    ingredients: Sequence[str],
    out: str | None,
    *,
    score_command: str | None,
    before_command: str | None,
    options: Mapping[str, Any],
) -> GreedyJob:
    """Make a job; options that are None keep their defaults.

    Raises
    ------
    RecipeError
        If an option is unknown or makes no sense.
    """
    if len(set(ingredients)) < 2:
        raise RecipeError(f"A greedy soup needs at least two different ingredients; there are {len(set(ingredients))}.")
    if len(set(ingredients)) < len(ingredients):
        twice = next(path for path in ingredients if ingredients.count(path) > 1)
        raise RecipeError(f"{twice}: is named twice. Name it once; with rounds it may enter again.")
    ingredients = [pinned_path(path) for path in ingredients]
    given = {name: value for name, value in options.items() if value is not None}
    rule = {f.name: given.pop(f.name) for f in fields(Rule) if f.name in given}
    pool = {f.name: given.pop(f.name) for f in fields(PoolOptions) if f.name in given}
    job = {name: given.pop(name) for name in _OF_JOB if name in given}
    if given:
        raise RecipeError(f"Unknown option {sorted(given)[0]!r} of a greedy soup.")
    if "own_scores" in job:
        job["own_scores"] = {pinned_path(path): score for path, score in job["own_scores"].items()}
    for path, score in job.get("own_scores", {}).items():
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise RecipeError(f"{path}: its own score is {score!r}, not a finite number.")
    if unknown := set(job.get("own_scores", ())) - set(ingredients):
        raise RecipeError(f"{sorted(unknown)[0]}: has a score, but is not among the ingredients.")
    job["also"] = tuple(job.get("also", ()))
    return GreedyJob(
        tuple(ingredients),
        out,
        Rule(**rule),
        score_command=score_command,
        before_command=before_command,
        pool=PoolOptions(**pool),
        **job,
    )


def change_job(job: GreedyJob, changes: Mapping[str, Any]) -> GreedyJob:
    """Change options of an interrupted job that decide nothing; None leaves one as it is.

    Raises
    ------
    RecipeError
        For any other option.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if unknown := sorted(given.keys() - _MAY_CHANGE - _MAY_CHANGE_OF_POOL):
        raise RecipeError(f"{unknown[0]}: cannot be changed when a greedy soup goes on. Begin anew in another folder.")
    pool = {name: given.pop(name) for name in _MAY_CHANGE_OF_POOL & given.keys()}
    if pool.get("device") == "cpu":  # what bounded a GPU before means nothing there
        pool.setdefault("device_budget_bytes", None)
    return replace(job, pool=replace(job.pool, **pool), **given)
