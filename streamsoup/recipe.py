"""Recipes: which ingredients, with which weights, how; as frozen values and as YAML."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from streamsoup.dtypes import parse_float_dtype
from streamsoup.errors import RecipeError
from streamsoup.units import parse_bytes

DEFAULT_SHARD_BYTES = 5_000_000_000  # what huggingface_hub writes
RECIPE_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A checkpoint with its weight, as given (not normalised)."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the bits of a soup.

    Attributes
    ----------
    ingredients : tuple of Ingredient
        In the order in which they are added.
    normalize : bool
        True: weights, divided by their sum. False: coefficients, applied as given.
    dtype : str or None
        Float dtype of the output, in torch's words; None keeps the dtype of the first ingredient.
    shard_bytes : int
        Largest output shard.
    buffers : {"identical", "first"}
        What to do with non-float tensors that differ: refuse, or take the first ingredient's.
    nonfinite : {"error", "warn", "allow"}
        What to do about NaN or infinity.
    """

    ingredients: tuple[Ingredient, ...]
    normalize: bool = True
    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    buffers: str = "identical"
    nonfinite: str = "error"

    def __post_init__(self) -> None:
        if not self.ingredients:
            raise RecipeError("A soup needs at least one ingredient.")
        for option, value, allowed in (
            ("buffers", self.buffers, ("identical", "first")),
            ("nonfinite", self.nonfinite, ("error", "warn", "allow")),
        ):
            if value not in allowed:
                raise RecipeError(f"{option}: {value!r} is not one of {', '.join(allowed)}.")
        if self.dtype is not None:
            object.__setattr__(self, "dtype", parse_float_dtype(self.dtype).torch_name)
        object.__setattr__(self, "shard_bytes", parse_bytes(self.shard_bytes))
        for ingredient in self.ingredients:
            if not math.isfinite(ingredient.weight):
                raise RecipeError(f"{ingredient.path}: weight {ingredient.weight} is not a finite number.")

    @property
    def method(self) -> str:
        """``uniform``, ``weighted`` or ``coefficients``: the recipe in one word."""
        if not self.normalize:
            return "coefficients"
        first = self.ingredients[0].weight
        return "uniform" if all(i.weight == first for i in self.ingredients) else "weighted"


def make_recipe(
    paths: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    coefficients: Sequence[float] | None = None,
    **options: Any,
) -> Recipe:
    """Put paths and numbers together.

    Raises
    ------
    RecipeError
        If both or the wrong number of weights are given.
    """
    if weights is not None and coefficients is not None:
        raise RecipeError("Give weights (divided by their sum) or coefficients (applied as given), not both.")
    numbers = coefficients if weights is None else weights
    if numbers is not None and len(numbers) != len(paths):
        raise RecipeError(f"{len(paths)} ingredients, but {len(numbers)} weights. Give one for each.")
    values = [1.0] * len(paths) if numbers is None else [float(w) for w in numbers]
    ingredients = tuple(Ingredient(str(p), w) for p, w in zip(paths, values, strict=True))
    return Recipe(ingredients, normalize=coefficients is None, **options)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make a recipe mean the same from any folder."""
    return replace(recipe, ingredients=tuple(replace(i, path=os.path.abspath(i.path)) for i in recipe.ingredients))


def recipe_to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Write a recipe as plain data that `recipe_from_mapping` reads back to the same value."""
    document: dict[str, Any] = {"streamsoup": RECIPE_FORMAT}
    document["ingredients"] = [{"path": i.path, "weight": i.weight} for i in recipe.ingredients]
    return document | {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "ingredients"}


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML that `read_recipe` reads back to the same value."""
    import yaml

    return str(yaml.safe_dump(recipe_to_mapping(recipe), sort_keys=False))


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file. Relative ingredient paths are taken from the folder of the file.

    Raises
    ------
    RecipeError
        If it is missing, no YAML, or says something unknown.
    """
    import yaml

    path = Path(path)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_strict_loader())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file.") from None
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path}: not a readable YAML file ({reason}).") from error
    recipe = recipe_from_mapping(document, where=str(path))
    base = path.resolve().parent
    return replace(recipe, ingredients=tuple(replace(i, path=str(base / i.path)) for i in recipe.ingredients))


def recipe_from_mapping(document: object, *, where: str) -> Recipe:
    """Check a parsed recipe and make a value of it."""
    if not isinstance(document, Mapping):
        raise RecipeError(f"{where}: a recipe is a mapping with the key 'ingredients'.")
    options = dict(document)
    version = options.pop("streamsoup", RECIPE_FORMAT)
    if version != RECIPE_FORMAT:
        raise RecipeError(f"{where}: recipe format {version}, but this version reads {RECIPE_FORMAT}.")
    rows = options.pop("ingredients", None)
    if not isinstance(rows, list) or not rows:
        raise RecipeError(f"{where}: 'ingredients' must be a list of paths or of mappings with 'path'.")
    ingredients = tuple(_ingredient(row, where) for row in rows)
    known = {f.name for f in fields(Recipe)} - {"ingredients"}
    for key in options:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}. Known: {', '.join(sorted(known))}.")
    if not isinstance(options.get("normalize", True), bool):
        raise RecipeError(f"{where}: normalize is true or false, not {options['normalize']!r}.")
    try:
        return Recipe(ingredients, **options)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _strict_loader() -> Any:
    """Make a loader that refuses a key that is there twice, instead of taking the last."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if isinstance(key, str) and keys.count(key) > 1:
                    raise yaml.YAMLError(f"the key {key!r} is there twice")
            return super().construct_mapping(node, deep)

    return StrictLoader


def _ingredient(row: object, where: str) -> Ingredient:
    if isinstance(row, str):
        return Ingredient(row)
    if not isinstance(row, Mapping) or not isinstance(row.get("path"), str):
        raise RecipeError(f"{where}: ingredient {row!r} is neither a path nor a mapping with 'path'.")
    if unknown := set(row) - {"path", "weight"}:
        raise RecipeError(f"{where}: unknown key {sorted(unknown)[0]!r} in ingredient {row['path']}.")
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RecipeError(f"{where}: weight {weight!r} of {row['path']} is not a number.")
    try:
        return Ingredient(row["path"], float(weight))
    except OverflowError:
        raise RecipeError(f"{where}: weight of {row['path']} is too large.") from None
