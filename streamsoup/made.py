"""A soup that was made, seen from outside: what its manifest and recipe say, and whether its files agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import Checkpoint, Opened, Opening, expect_identity, open_checkpoints
from streamsoup.errors import ChangedIngredientError, CheckpointError, MismatchError, RecipeError, listed
from streamsoup.manifest import MANIFEST_FORMAT, MANIFEST_NAME, RECIPE_NAME
from streamsoup.plan import Plan
from streamsoup.recipe import Recipe, read_recipe
from streamsoup.soup_plan import open_ingredients
from streamsoup.workspace import Destination, Workspace, destination_of


@dataclass(frozen=True, slots=True)
class Made:
    """A soup with what lies beside it.

    Attributes
    ----------
    destination : Destination
    manifest : mapping
    recipe : Recipe
    records : tuple of mapping
        What the manifest says of each of the recipe's checkpoints.
    """

    destination: Destination
    manifest: Mapping[str, Any]
    recipe: Recipe
    records: tuple[Mapping[str, Any], ...]


def read_made(path: str | Path) -> Made:
    """Read manifest and recipe of a soup.

    Raises
    ------
    CheckpointError, RecipeError
        If it has none, or they do not belong together.
    """
    destination = destination_of(path)
    manifest = Workspace(destination).read_manifest()
    place = destination.beside(MANIFEST_NAME)
    if manifest.get("streamsoup_manifest") != MANIFEST_FORMAT:
        raise CheckpointError(
            f"{path}: has no {place.name} that this version reads, so there is nothing to compare it with. Name a soup "
            "with the files that were written beside it.",
            path=str(path),
        )
    recipe = read_recipe(destination.beside(RECIPE_NAME))
    try:
        base = [manifest["base"]] if "base" in manifest else []
        records = (*base, *manifest["ingredients"], *manifest.get("importances", []))
        whole = all(isinstance(r["shards"], list) and isinstance(r["content_digest"], str) for r in records)
        whole = whole and all(isinstance(shard, dict) for record in records for shard in record["shards"])
        whole = whole and isinstance(manifest.get("notes", []), list)
        weights = [entry["weight"] for entry in manifest["ingredients"]]
        whole = whole and (manifest["method"], weights) == (recipe.label, [i.weight for i in recipe.ingredients])
        whole = whole and all(isinstance(s["name"], str) and s["size_bytes"] >= 0 for s in manifest["shards"])
    except (KeyError, TypeError):
        records, whole = (), False
    if not whole or len(records) != len(recipe.checkpoints):
        raise CheckpointError(
            f"{place}: does not belong to {RECIPE_NAME}, or was changed. Put back what was written beside the soup.",
            path=str(place),
        )
    return Made(destination, manifest, recipe, records)


def moved(made: Made, places: Sequence[str | Path]) -> Made:
    """Say where the checkpoints of a soup are now.

    Parameters
    ----------
    made : Made
    places : sequence of path
        In the recipe's order: the base, if there is one, the ingredients, their importances.

    Raises
    ------
    RecipeError
    """
    recipe, given = made.recipe, [str(place) for place in places]
    if len(given) != len(recipe.checkpoints):
        raise RecipeError(
            f"{len(given)} place(s) of ingredients, but {made.destination.path} was made of {len(recipe.checkpoints)} "
            "checkpoints. Name all, in the recipe's order (the base first)."
        )
    first = 0 if recipe.base is None else 1
    count = len(recipe.ingredients)
    beside = iter(given[first + count :])
    ingredients = tuple(
        replace(i, path=path, importance=None if i.importance is None else next(beside))
        for i, path in zip(recipe.ingredients, given[first : first + count], strict=True)
    )
    return replace(made, recipe=replace(recipe, ingredients=ingredients, base=given[0] if first else None))


def check_ingredients(made: Made) -> tuple[Opened, list[str]]:
    """Open the checkpoints of a soup, and say what is wrong with them: one sentence each."""
    try:
        opened = open_ingredients(made.recipe)
    except (CheckpointError, MismatchError) as error:
        each = [problem for path in made.recipe.checkpoints if (problem := _why_not(path, made.recipe.key))]
        return Opened([]), each or [str(error)]
    problems = []
    for checkpoint, record in zip(opened.checkpoints, made.records, strict=True):
        try:
            expect_identity(
                checkpoint, record["shards"], what="the soup was made", otherwise="name its new place (--ingredients)"
            )
        except ChangedIngredientError as error:
            problems.append(str(error))
        except KeyError:
            problems.append(f"{checkpoint.path}: the manifest does not say what it was. Put back the manifest.")
    return opened, problems


def _why_not(path: str, key: str | None) -> str | None:
    try:
        open_checkpoints([path], Opening(key=key))
    except (CheckpointError, MismatchError) as error:
        return f"{error} If it was moved, say where it is now (--ingredients)."
    return None


def check_files(made: Made, plan: Plan, soup: Checkpoint) -> list[str]:
    """Compare names, sizes and headers of a soup's files with its manifest and with what the recipe makes."""
    problems = []
    sizes = {Path(shard.path).name: shard.size_bytes for shard in soup.shards}
    recorded = {shard["name"]: shard["size_bytes"] for shard in made.manifest["shards"]}
    planned = {shard.name: shard.file_bytes for shard in plan.layout.shards}
    for name in sorted({*sizes, *recorded}):
        if sizes.get(name) != recorded.get(name):
            problems.append(f"{name}: {_size(sizes.get(name))}, but {_size(recorded.get(name))} in the manifest.")
    if not problems:
        for name in sorted({*recorded, *planned}):
            if recorded.get(name) != planned.get(name):
                problems.append(f"{name}: {_size(recorded.get(name))}, but {_size(planned.get(name))} by the recipe.")
    return problems or _check_tables(plan, soup) or _check_heads(plan, soup)


def _size(found: int | None) -> str:
    return "not there" if found is None else f"{found:,} bytes"


def _check_tables(plan: Plan, soup: Checkpoint) -> list[str]:
    table, positions, problems = plan.table, soup.table.positions(), []
    for tensor, name in enumerate(table.names):
        wanted = f"{plan.out_dtype(tensor).name} {table.shape(tensor)}"
        place = positions.pop(name, None)
        found = "missing" if place is None else f"{soup.table.dtype(place).name} {soup.table.shape(place)}"
        if found != wanted:
            problems.append(f"{name}: {found} in the soup, but {wanted} by the recipe.")
    problems += [f"{name}: in the soup, but not by the recipe." for name in positions]
    return [listed(problems)] if problems else []


def _check_heads(plan: Plan, soup: Checkpoint) -> list[str]:
    heads = {shard.name: shard.head for shard in plan.layout.shards}
    problems = []
    for shard in soup.shards:
        head = heads[Path(shard.path).name]
        with open(shard.path, "rb") as file:
            if file.read(len(head)) != head:
                problems.append(f"{shard.path}: its header (offsets or metadata) is not what the recipe makes.")
    return problems


def positions_in(soup: Checkpoint, plan: Plan) -> npt.NDArray[np.int64]:
    """Where a plan's tensors stand in the soup's table, shape (tensors,)."""
    known = soup.table.positions()
    return np.array([known[name] for name in plan.table.names], np.int64)
