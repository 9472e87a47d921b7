"""Recipes: which ingredients, with which weights, how; as frozen values and as YAML."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from streamsoup.checkpoints.hub import absolute, is_hub_id, is_there, pinned
from streamsoup.checkpoints.opening import Opening
from streamsoup.checkpoints.paths import change_path
from streamsoup.dtypes import parse_float_dtype
from streamsoup.errors import RecipeError
from streamsoup.methods.parameters import plain
from streamsoup.strict_yaml import read_yaml
from streamsoup.units import parse_bytes

DEFAULT_SHARD_BYTES = 5_000_000_000  # what huggingface_hub writes
RECIPE_FORMAT = 1
QUANTISATIONS = ("fp8-block",)
NONFINITE = ("error", "warn", "allow", "keep")
_SAID_ALWAYS = ("normalize", "dtype", "shard_bytes", "buffers", "nonfinite")


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A checkpoint with its weight, as given (not normalised).

    Attributes
    ----------
    path : str
    weight : float
    parameters : mapping of str to setting
        Of a method, for this ingredient; see `streamsoup.methods.parameters`.
    importance : str or None
        A checkpoint of the same shapes that says how much each element matters, for the method ``fisher``.
    """

    path: str
    weight: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    importance: str | None = None


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
    nonfinite : {"error", "warn", "allow", "keep"}
        What to do about NaN or infinity; ``keep`` lets pass, with one note, what an ingredient has, and refuses numbers
        that only the soup's dtype is too small for.
    method : str
        One of `streamsoup.methods.registry.METHODS`; ``uniform`` and ``weighted`` are ``linear``.
    base : str or None
        The checkpoint that the ingredients were fine-tuned from, where the method wants it. It then gives names, dtypes
        and configuration files instead of the first ingredient.
    parameters : mapping of str to setting
        Of the method; see `streamsoup.methods.parameters`.
    include, exclude : tuple of str
        Shell patterns of tensor names: others are taken from the first checkpoint as they are.
    accumulate : {"float64", "float32"}
        In what sums are kept: float32 is for devices that are slow in float64, and less exact; see docs/numerics.md.
    quantize : str or None
        ``fp8-block``: the linear weights of the one ingredient are quantised (`streamsoup.checkpoints.quantised`),
        and `dtype` is that of the other tensors.
    key, strip_prefix, rename, only_shared, leave_out
        How tensors are named and found, see `streamsoup.checkpoints.opening.Opening`; patterns see the new names.
    """

    ingredients: tuple[Ingredient, ...]
    normalize: bool = True
    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    buffers: str = "identical"
    nonfinite: str = "error"
    method: str = "linear"
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    accumulate: str = "float64"
    quantize: str | None = None
    key: str | None = None
    strip_prefix: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    only_shared: bool = False
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.ingredients:
            raise RecipeError("A soup needs at least one ingredient.")
        for option, value, allowed in (
            ("buffers", self.buffers, ("identical", "first")),
            ("accumulate", self.accumulate, ("float64", "float32")),
            ("quantize", self.quantize, (None, *QUANTISATIONS)),
            ("nonfinite", self.nonfinite, NONFINITE),
        ):
            if value not in allowed:
                raise RecipeError(f"{option}: {value!r} is not one of {', '.join(filter(None, allowed))}.")
        if self.dtype is not None:
            object.__setattr__(self, "dtype", parse_float_dtype(self.dtype).torch_name)
        object.__setattr__(self, "shard_bytes", parse_bytes(self.shard_bytes))
        object.__setattr__(self, "parameters", {name: plain(name, s) for name, s in self.parameters.items()})
        object.__setattr__(
            self,
            "ingredients",
            tuple(
                replace(i, parameters={name: plain(name, s) for name, s in i.parameters.items()}) if i.parameters else i
                for i in self.ingredients
            ),
        )
        if self.method in ("lawa", "swa"):
            self._keep_latest()
        if self.method in ("uniform", "weighted"):
            if self.method == "uniform" and len({i.weight for i in self.ingredients}) > 1:
                raise RecipeError("Method uniform takes no weights. Leave them out, or give method weighted.")
            object.__setattr__(self, "method", "linear")
        for ingredient in self.ingredients:
            # Not `absolute_path`: a recipe is a value, and asks no Hub.
            if self.base is not None and _from_root(ingredient.path) == _from_root(self.base):
                raise RecipeError(f"{ingredient.path}: is the base, and an ingredient too. Leave it out of them.")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            object.__setattr__(self, name, (patterns,) if isinstance(patterns, str) else tuple(patterns))
        self.opening.put_into(self)
        if not self.normalize and self.method != "linear":
            raise RecipeError(f"Coefficients are applied as given by method linear only, not by {self.method}.")
        if self.quantize is not None and (len(self.checkpoints) > 1 or not self.normalize):
            raise RecipeError("quantize: takes one checkpoint as it is. Make the soup first, then quantise that.")
        if self.quantize is not None and self.dtype is not None and parse_float_dtype(self.dtype).is_fp8:
            raise RecipeError(f"dtype: {self.dtype} beside fp8 with scales could not be read again. Give another.")
        importances = [i for i in self.ingredients if i.importance is not None]
        if len(importances) != (len(self.ingredients) if self.method == "fisher" else 0):
            raise RecipeError("importance: method fisher wants one of each ingredient, and other methods none.")
        for ingredient in self.ingredients:
            if not math.isfinite(ingredient.weight):
                raise RecipeError(f"{ingredient.path}: weight {ingredient.weight} is not a finite number.")

    def _keep_latest(self) -> None:
        """Turn an average of the latest checkpoints into the uniform soup of these: others need not be read."""
        name, default = ("start", 0) if self.method == "swa" else ("window", 5)
        number = self.parameters.get(name, default)
        if unknown := sorted({*self.parameters} - {name}):
            raise RecipeError(f"{unknown[0]}: method {self.method} has no such parameter. Known: {name}.")
        if self.base is not None:
            raise RecipeError(f"Method {self.method} takes no base. Leave it out, or name it among the ingredients.")
        if isinstance(number, bool) or not isinstance(number, int):
            raise RecipeError(f"{name}: {number!r} is not a whole number.")
        if any(i.weight != 1.0 or i.parameters for i in self.ingredients):
            raise RecipeError(f"Method {self.method} takes no weights. Leave them out.")
        count = len(self.ingredients)
        first = number if self.method == "swa" else count - number
        if not 0 <= first < count:
            raise RecipeError(f"{count} checkpoints, but the average begins at number {first}. Change {name}.")
        object.__setattr__(self, "ingredients", self.ingredients[first:])
        object.__setattr__(self, "method", "linear")
        object.__setattr__(self, "parameters", {})

    @property
    def opening(self) -> Opening:
        """How tensors are named and found."""
        return Opening.of(self)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Paths of all that is read, in the order that methods see it: base, ingredients, importances."""
        paths = [] if self.base is None else [self.base]
        paths += [i.path for i in self.ingredients]
        return (*paths, *(i.importance for i in self.ingredients if i.importance is not None))

    @property
    def label(self) -> str:
        """The method in one word: for linear ones ``uniform``, ``weighted`` or ``coefficients``."""
        if self.method != "linear" or self.parameters or any(i.parameters for i in self.ingredients):
            return self.method
        if not self.normalize:
            return "coefficients"
        first = self.ingredients[0].weight
        return "uniform" if all(i.weight == first for i in self.ingredients) else "weighted"


def make_recipe(
    paths: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    coefficients: Sequence[float] | None = None,
    importances: Sequence[str | Path] | None = None,
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
    if importances is not None and len(importances) != len(paths):
        raise RecipeError(f"{len(paths)} ingredients, but {len(importances)} importances. Give one for each.")
    beside = [None] * len(paths) if importances is None else [str(p) for p in importances]
    ingredients = tuple(Ingredient(str(p), w, importance=i) for p, w, i in zip(paths, values, beside, strict=True))
    return Recipe(ingredients, normalize=coefficients is None, **options)


def _from_root(path: str) -> str:
    return change_path(path, os.path.abspath)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make a recipe mean the same from any folder; ids of the Hub are pinned to their commits."""
    return with_paths(recipe, absolute)


def with_pinned_ids(recipe: Recipe) -> Recipe:
    """Pin ids of the Hub to their commits: a branch may move, and an interrupted soup is gone on with."""
    return with_paths(recipe, pinned)


def with_paths(recipe: Recipe, change: Callable[[str], str], exists: Callable[[str], bool] = is_there) -> Recipe:
    """Change every path of a recipe; of a base with adapters, each. `exists`: whether there is what a path names."""

    def maybe(path: str | None) -> str | None:
        return None if path is None else change_path(path, change, exists)

    ingredients = tuple(
        replace(i, path=change_path(i.path, change, exists), importance=maybe(i.importance)) for i in recipe.ingredients
    )
    return replace(recipe, ingredients=ingredients, base=maybe(recipe.base))


def recipe_to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Write a recipe as plain data that `recipe_from_mapping` reads back to the same value."""
    document: dict[str, Any] = {"streamsoup": RECIPE_FORMAT}
    document["ingredients"] = [_row(i) for i in recipe.ingredients]
    for one in fields(recipe):
        value = getattr(recipe, one.name)
        if one.name in _SAID_ALWAYS or (one.name != "ingredients" and value and value != one.default):
            document[one.name] = list(value) if isinstance(value, tuple) else value
    return document


def _row(ingredient: Ingredient) -> dict[str, Any]:
    row: dict[str, Any] = {"path": ingredient.path, "weight": ingredient.weight}
    if ingredient.parameters:
        row["parameters"] = dict(ingredient.parameters)
    if ingredient.importance is not None:
        row["importance"] = ingredient.importance
    return row


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML that `read_recipe` reads back to the same value."""
    import yaml

    return str(yaml.safe_dump(recipe_to_mapping(recipe), sort_keys=False))


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file. Relative ingredient paths are taken from the folder of the file.

    What is not there may be the id of a repository on the Hugging Face Hub.

    Raises
    ------
    RecipeError
        If it is missing, no YAML, or says something unknown.
    """
    path = Path(path)
    document = read_yaml(path)
    recipe = recipe_from_mapping(document, where=str(path))
    folder = path.resolve().parent

    def from_there(given: str) -> str:
        return given if is_hub_id(given) and not os.path.lexists(folder / given) else str(folder / given)

    return with_paths(recipe, from_there, lambda given: (folder / given).exists() or is_hub_id(given))


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
    if not isinstance(options.get("parameters", {}), Mapping):
        raise RecipeError(f"{where}: parameters is a mapping of names to settings, not {options['parameters']!r}.")
    for key in ("method", "base"):
        if not isinstance(options.get(key, ""), str | None):
            raise RecipeError(f"{where}: {key} is a word or a path, not {options[key]!r}.")
    for key in ("include", "exclude", "strip_prefix", "leave_out"):
        patterns = options.get(key, ())
        if not isinstance(patterns, str) and not (
            isinstance(patterns, list | tuple) and all(isinstance(p, str) for p in patterns)
        ):
            raise RecipeError(f"{where}: {key} is a list of patterns, not {patterns!r}.")
    try:
        return Recipe(ingredients, **options)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _ingredient(row: object, where: str) -> Ingredient:
    if isinstance(row, str):
        return Ingredient(row)
    if not isinstance(row, Mapping) or not isinstance(row.get("path"), str):
        raise RecipeError(f"{where}: ingredient {row!r} is neither a path nor a mapping with 'path'.")
    if unknown := set(row) - {"path", "weight", "parameters", "importance"}:
        raise RecipeError(f"{where}: unknown key {sorted(unknown)[0]!r} in ingredient {row['path']}.")
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RecipeError(f"{where}: weight {weight!r} of {row['path']} is not a number.")
    parameters, importance = row.get("parameters", {}), row.get("importance")
    if not isinstance(parameters, Mapping) or not isinstance(importance, str | None):
        raise RecipeError(f"{where}: parameters of {row['path']} are a mapping, and importance is a path.")
    try:
        return Ingredient(row["path"], float(weight), parameters, importance)
    except OverflowError:
        raise RecipeError(f"{where}: weight of {row['path']} is too large.") from None
