"""Open a checkpoint, or the soup of several, to be looked at: what a person gives becomes a recipe and its view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streamsoup.backends.protocol import Backend
from streamsoup.checkpoints import expand_paths, is_state, live_name, open_live, pinned_path
from streamsoup.errors import RecipeError
from streamsoup.execution import Execution
from streamsoup.methods import Method
from streamsoup.outcome import Progress
from streamsoup.recipe import Recipe, make_recipe, read_recipe, with_pinned_ids
from streamsoup.sinks import wait_for_caller
from streamsoup.units import parse_bytes
from streamsoup.view import SoupView


def open(
    ingredients: Any,
    *,
    weights: Sequence[float] | None = None,
    coefficients: Sequence[float] | None = None,
    method: str | Method = "linear",
    base: Any = None,
    budget_bytes: int | str | None = None,
    device: str = "cpu",
    device_budget_bytes: int | str | None = None,
    workers: int | None = None,
    read_mode: str = "auto",
    progress: Callable[[Progress], None] | None = None,
    backend: Backend | None = None,
    **options: Any,
) -> SoupView:
    """Open a checkpoint, or the soup of several, as a mapping of names to tensors. Headers alone are read for it.

    Parameters
    ----------
    ingredients : path, pattern, Recipe, recipe file, Checkpoint, module or dict of tensors, or a sequence of these
        As in `streamsoup.soup`. Also what is open already: a `Checkpoint`, or live tensors, which must then stay as
        they are for as long as the view is used. ``.yaml`` and ``.yml`` files are recipes.
    weights, coefficients, base
        As in `streamsoup.soup`.
    method : str or Method
        By name, or an object of your own: anything that satisfies `streamsoup.methods.Method`.
    budget_bytes, device, device_budget_bytes, workers, read_mode, progress
        See `Execution`.
    backend : Backend, optional
        A device of your own, instead of one by name: anything that satisfies `streamsoup.backends.protocol.Backend`.
    **options
        ``parameters``, ``importances``, ``include``, ``exclude``, ``key``, ``strip_prefix``, ``rename``,
        ``only_shared``, ``dtype``, ``quantize``, ``shard_size``, ``buffers``, ``nonfinite``, ``accumulate``: as in
        `streamsoup.soup`.

    Returns
    -------
    SoupView

    Raises
    ------
    StreamsoupError
    """
    execution = Execution(
        budget_bytes=None if budget_bytes is None else parse_bytes(budget_bytes),
        device=device,
        device_budget_bytes=None if device_budget_bytes is None else parse_bytes(device_budget_bytes),
        workers=workers,
        read_mode=read_mode,
        progress=progress,
    )
    if isinstance(ingredients, str | Path) and Path(ingredients).suffix in (".yaml", ".yml"):
        ingredients = read_recipe(ingredients)
    if isinstance(ingredients, Recipe):
        given = {"weights": weights, "coefficients": coefficients, "base": base, **options}
        if method != "linear" or (said := [name for name, value in given.items() if value is not None]):
            raise RecipeError(
                f"{said[0] if method == 'linear' else 'method'}: is the recipe's to say. Change the recipe."
            )
        return SoupView(with_pinned_ids(ingredients), execution, backend=backend)
    several = isinstance(ingredients, Sequence) and not isinstance(ingredients, str)
    named = _Named()
    paths = [named.name(one) for one in (ingredients if several else [ingredients])]
    if not named.opened and weights is None and coefficients is None:
        paths = expand_paths(paths)
    if "shard_size" in options:
        options["shard_bytes"] = parse_bytes(options.pop("shard_size"))
    options = {k: tuple(v) if k in ("include", "exclude") and not isinstance(v, str) else v for k, v in options.items()}
    own = None if isinstance(method, str) else method
    try:
        recipe = make_recipe(
            paths,
            weights=weights,
            coefficients=coefficients,
            method=method if own is None else "linear",
            base=None if base is None else named.name(base),
            **options,
        )
    except TypeError as error:
        raise RecipeError(f"{error}. See streamsoup.open for the options that there are.") from None
    return SoupView(recipe, execution, opened=named.opened, method=own, backend=backend)


class _Named:
    """Names of what is open already, for a recipe."""

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}

    def name(self, given: Any) -> str:
        if isinstance(given, str | Path):
            return pinned_path(str(given))
        if is_state(given):
            live = open_live(given, live_name(len(self.opened) + 1))
            wait_for_caller(array for array in live.arrays if hasattr(array, "is_cuda"))
            given = live
        if not hasattr(given, "table"):
            raise RecipeError(
                f"A {type(given).__name__} is no ingredient. Give paths, Checkpoints, modules, or dicts of tensors."
            )
        self.opened[given.path] = given
        return str(given.path)
