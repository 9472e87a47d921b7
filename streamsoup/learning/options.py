"""Sorts flat options into the values that a learned soup is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamsoup.checkpoints import absolute_path, real_path
from streamsoup.errors import RecipeError
from streamsoup.greedy_job import GreedyResult
from streamsoup.learning.groups import By
from streamsoup.learning.job import LearnJob
from streamsoup.learning.mixture import MakeOptimizer
from streamsoup.manifest import RECIPE_NAME
from streamsoup.pool import PoolOptions
from streamsoup.recipe import read_recipe

Init = str | Path | GreedyResult | Mapping[str, float] | Sequence[float]
_OF_POOL = (
    *("dtype", "shard_bytes", "buffers", "nonfinite"),
    *("key", "strip_prefix", "rename", "only_shared"),
    *("budget_bytes", "device", "device_budget_bytes", "workers", "read_mode"),
)
_OF_JOB = ("parametrisation", "temperature", "lr", "weight_decay", "epochs", "accumulate", "seed", "patience")


def make_learn_job(
    paths: Sequence[str],
    *,
    by: By,
    init: Init,
    restrict: bool,
    held_out: bool,
    optimizer: str | MakeOptimizer,
    options: Mapping[str, Any],
) -> LearnJob:
    """Make a job of what `learn` is given; options that are None keep their defaults.

    Raises
    ------
    RecipeError
    """
    if len(set(paths)) < 2:
        raise RecipeError(f"A learned soup needs two ingredients at least; there is {len(set(paths))}.")
    given = {name: value for name, value in options.items() if value is not None}
    pool = {name: given.pop(name) for name in _OF_POOL if name in given}
    own = {name: given.pop(name) for name in _OF_JOB if name in given}
    if given:
        raise RecipeError(f"Unknown option {sorted(given)[0]!r} of a learned soup.")
    if "patience" in own and not held_out:
        raise RecipeError("patience: waits for a lower held-out loss, but there are no held-out batches. Give both.")
    if not isinstance(optimizer, str) and (own.keys() & {"lr", "weight_decay"}):
        raise RecipeError("lr and weight_decay are for an optimiser by name. Give them to the one that you make.")
    known = [real_path(path) for path in paths]
    if twice := next((path for path, real in zip(paths, known, strict=True) if known.count(real) > 1), None):
        raise RecipeError(f"{twice}: is named twice. Name it once.")
    start = _start(paths, init)
    if restrict and start is None:
        raise RecipeError("restrict leaves out what init does without. Give both.")
    if restrict and start is not None:
        chosen = [i for i, weight in enumerate(start) if weight]
        paths, start = [paths[i] for i in chosen], tuple(start[i] for i in chosen)
    return LearnJob(
        tuple(absolute_path(path) for path in paths),
        by=by if isinstance(by, str) else tuple(by),
        init=start,
        optimizer=optimizer if isinstance(optimizer, str) else getattr(optimizer, "__qualname__", "custom"),
        pool=PoolOptions(**pool),
        **own,
    )


def _start(paths: Sequence[str], init: Init) -> tuple[float, ...] | None:
    """Coefficients to begin with, that add up to one; None: equal ones."""
    if isinstance(init, str) and init == "uniform":
        return None
    if isinstance(init, str | Path):
        init = _weights_of(Path(init))
    if isinstance(init, GreedyResult):
        init = {member.path: member.weight for member in init.members}
    if isinstance(init, Mapping):
        weights = _added((path, float(weight)) for path, weight in init.items())
        known = [real_path(path) for path in paths]
        if unknown := sorted(weights.keys() - set(known)):
            raise RecipeError(f"init: {unknown[0]} has a weight, but is not among the ingredients.")
        init = [weights.get(path, 0.0) for path in known]
    init = [float(weight) for weight in init]
    if len(init) != len(paths):
        raise RecipeError(f"init: {len(paths)} ingredients, but {len(init)} weights. Give one for each.")
    total = sum(init)
    if not all(abs(w) < float("inf") for w in init) or not total > 0:
        raise RecipeError(f"init: the weights {list(init)} must be finite, with a sum above zero.")
    return tuple(weight / total for weight in init)


def _added(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Add up the weights of each checkpoint, by its real path."""
    found: dict[str, float] = {}
    for path, weight in pairs:
        real = real_path(path)
        found[real] = found.get(real, 0.0) + weight
    return found


def _weights_of(soup: Path) -> dict[str, float]:
    recipe = read_recipe(soup / RECIPE_NAME if soup.is_dir() else soup)
    if recipe.method != "linear" or recipe.parameters or any(i.parameters for i in recipe.ingredients):
        raise RecipeError(f"init: {soup} has no weights for whole ingredients. Begin from a uniform or greedy soup.")
    return _added((ingredient.path, ingredient.weight) for ingredient in recipe.ingredients)
