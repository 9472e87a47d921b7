"""From a recipe to the plan of its soup: the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from streamsoup.budget import default_budget_bytes
from streamsoup.checkpoints import Checkpoint, Opened, adapter_notes, notes_of, open_together, quantised
from streamsoup.devices import choose_means
from streamsoup.execution import Execution
from streamsoup.methods import Method, linear
from streamsoup.methods.parameters import Parameters
from streamsoup.methods.registry import Given, make_method
from streamsoup.methods.selected import select
from streamsoup.plan import Plan
from streamsoup.planner import make_plan, tensor_bytes
from streamsoup.ranks import Ranks
from streamsoup.read import choose_mode
from streamsoup.recipe import Recipe
from streamsoup.workspace import Destination, check_destination, destination_of


def parameters_of(recipe: Recipe) -> Parameters:
    """Gather the settings of a recipe."""
    return Parameters(recipe.parameters, tuple(i.parameters for i in recipe.ingredients))


def method_of(recipe: Recipe) -> Method:
    """Make the method of a recipe.

    Raises
    ------
    RecipeError
    """
    weights = tuple(i.weight for i in recipe.ingredients)
    if recipe.method == "linear" and not recipe.parameters and not any(i.parameters for i in recipe.ingredients):
        return linear(weights, normalize=recipe.normalize, name=recipe.label)
    given = Given(recipe.method, weights, recipe.normalize, recipe.base is not None, parameters_of(recipe))
    return make_method(given)


def open_ingredients(recipe: Recipe, known: Mapping[str, Checkpoint] = MappingProxyType({})) -> Opened:
    """Open all that a recipe reads, as it is read, but for what is `known` already, by path.

    Raises
    ------
    CheckpointError, MismatchError, RecipeError
    """
    opened = open_together([known.get(path, path) for path in recipe.checkpoints], recipe.opening)
    if recipe.quantize is None:
        return opened
    return replace(opened, checkpoints=[quantised(checkpoint) for checkpoint in opened.checkpoints])


def plan_soup(
    recipe: Recipe, out: str | Path | None, execution: Execution, *, resuming: bool = False
) -> tuple[Plan, str]:
    """Make the plan of a soup from headers alone, and say how it would be read.

    Raises
    ------
    StreamsoupError
    """
    plan, settled = _plan(recipe, out, execution, resuming=resuming)
    return plan, settled.read_mode


def _plan(
    recipe: Recipe, out: str | Path | None, execution: Execution, *, resuming: bool = False, local_ranks: int = 1
) -> tuple[Plan, Execution]:
    """Open, plan, and check where the soup is to go; see `plan_opened`."""
    destination = None if out is None else destination_of(out)
    opened = open_ingredients(recipe)
    plan, settled = plan_opened(recipe, opened, destination, execution, local_ranks=local_ranks)
    if destination is not None:
        check_destination(destination, opened.checkpoints, overwrite=execution.overwrite, resuming=resuming)
    return plan, settled


def plan_opened(
    recipe: Recipe,
    opened: Opened,
    destination: Destination | None,
    execution: Execution,
    *,
    local_ranks: int = 1,
    worker_bytes: int = 0,
    own: Method | None = None,
) -> tuple[Plan, Execution]:
    """Plan with checkpoints that are open already, wherever the soup may go.

    Parameters
    ----------
    recipe : Recipe
    opened : Opened
        The recipe's checkpoints.
    destination : Destination or None
    execution : Execution
    local_ranks : int
        Processes on this machine, which share its cores and memory.
    worker_bytes : int
        What a thread that writes tiles holds beside them.
    own : Method, optional
        Instead of the recipe's.

    Returns
    -------
    plan : Plan
    settled : Execution
        With what was chosen where nothing was asked for.

    Raises
    ------
    StreamsoupError
    """
    method = method_of(recipe) if own is None else own
    checkpoints = opened.checkpoints
    names = checkpoints[0].table.names
    method, touched = select(method, recipe.include, recipe.exclude, names)
    touched = [*opened.touched, *touched, *parameters_of(recipe).touched(names)]
    mode = choose_mode(checkpoints, execution.read_mode)
    means = choose_means(execution.device, mode, execution.workers, tensor_bytes=tensor_bytes(checkpoints))
    if execution.workers is None and not means["locked"]:  # ranks share the cores, but each has its own device
        means["workers"] = max(1, means["workers"] // local_ranks)
    settled = replace(
        execution,
        budget_bytes=execution.budget_bytes or default_budget_bytes() // local_ranks,
        workers=means["workers"],
        read_mode=mode,
    )
    assert settled.budget_bytes is not None
    plan = make_plan(
        checkpoints,
        method,
        dtype=recipe.dtype,
        shard_bytes=recipe.shard_bytes,
        file_name=destination.path.name if destination and destination.is_file else None,
        budget_bytes=settled.budget_bytes,
        reserved_bytes=worker_bytes * means["workers"],
        touched=touched,
        accumulate=recipe.accumulate,
        notes=(*adapter_notes(checkpoints), *notes_of(checkpoints)),
        left_out=opened.left_out,
        **means,
    )
    return plan, settled


def plan_together(
    ranks: Ranks, recipe: Recipe, out: str | Path, execution: Execution, *, resuming: bool = False
) -> tuple[Plan, Execution]:
    """Plan on every rank as on the first: with its budget, threads and way of reading.

    Raises
    ------
    StreamsoupError
    RankError
        If the plans are not the same all the same.
    """
    plans: list[Plan] = []

    def plan_first() -> tuple[int | None, int | None, str]:
        plan, settled = _plan(recipe, out, execution, resuming=resuming, local_ranks=ranks.local_count)
        plans.append(plan)
        return settled.budget_bytes, settled.workers, settled.read_mode

    budget_bytes, workers, mode = ranks.first(plan_first)
    execution = replace(execution, budget_bytes=budget_bytes, workers=workers, read_mode=mode)
    if not ranks.is_first:
        plans.append(_plan(recipe, out, execution, resuming=True)[0])
    ranks.agree("plan", f"{plans[0].fingerprint} {plans[0].tiling}")
    return plans[0], execution
