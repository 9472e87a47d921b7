"""Recipes of mergekit: what its YAML says, as a `Recipe`.

The numbers are those of mergekit 0.1.5 up to its rounding; docs/mergekit.md says where, and why, they are not. What
cannot be said in a recipe is refused in one sentence; mergekit's own parser leaves out what it does not know.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamsoup.checkpoints import absolute_path, is_hub_id, open_checkpoints
from streamsoup.checkpoints.hub import resolve
from streamsoup.checkpoints.sliced import Part, join_parts, layer_stack, scales_of
from streamsoup.dtypes import parse_float_dtype
from streamsoup.errors import RecipeError
from streamsoup.mergekit_settings import Settings, covers, joined, read_flag, read_settings
from streamsoup.methods.catalogue import MAY_HAVE_BASE, NEEDS_BASE, NO_BASE
from streamsoup.methods.parameters import Parameters
from streamsoup.methods.protocol import TensorInfo
from streamsoup.recipe import Ingredient, Recipe
from streamsoup.strict_yaml import read_yaml


@dataclass(frozen=True, slots=True)
class _Method:
    """What a method of mergekit takes.

    Attributes
    ----------
    base : str
        With `NO_BASE`, a base model is one more model.
    each, shared : tuple of str
        Numbers that each model may have its own of, and those for all.
    flags : mapping of str to bool
        With their defaults.
    required : str
        The number that has none, if any.
    least, most : int or None
        Models beside the base.
    unused : tuple of str
        Known, and without effect.
    """

    base: str
    each: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    flags: Mapping[str, bool] = field(default_factory=dict)
    required: str = ""
    least: int = 1
    most: int | None = None
    unused: tuple[str, ...] = ("int8_mask",)


def _vectors(*each: str, normalize: bool = False, rescale: bool = False) -> _Method:
    flags = {"normalize": normalize, "rescale": rescale}
    return _Method(NEEDS_BASE, ("weight", "density", *each), ("lambda",), flags, "weight")


_METHODS: dict[str, _Method] = {
    "linear": _Method(NO_BASE, ("weight",), flags={"normalize": True}, required="weight"),
    "slerp": _Method(NEEDS_BASE, shared=("t",), required="t", most=1),
    "nuslerp": _Method(
        MAY_HAVE_BASE, ("weight",), (), {"nuslerp_flatten": True, "nuslerp_row_wise": False}, "weight", 2, 2
    ),
    "multislerp": _Method(MAY_HAVE_BASE, ("weight",), ("eps",), {"normalize_weights": True}, "weight", 2),
    "karcher": _Method(NO_BASE, shared=("max_iter", "tol"), least=2),
    "task_arithmetic": _Method(
        NEEDS_BASE, ("weight",), ("lambda",), {"normalize": False}, "weight",
        unused=("int8_mask", "density", "rescale"),
    ),
    "ties": _vectors(normalize=True),
    "dare_linear": _vectors(rescale=True),
    "dare_ties": _vectors(rescale=True),
    "della": _vectors("epsilon", normalize=True, rescale=True),
    "della_linear": _vectors("epsilon", rescale=True),
    "breadcrumbs": _vectors("gamma"),
    "breadcrumbs_ties": _vectors("gamma"),
    "sce": _Method(NEEDS_BASE, shared=("select_topk",)),
    "model_stock": _Method(NEEDS_BASE, flags={"filter_wise": False}, least=2),
    "passthrough": _Method(NO_BASE, ("scale",), most=1),
}  # fmt: skip
RANDOM_METHODS = ("dare_linear", "dare_ties", "della", "della_linear")

_TOKENIZER_KEYS = ("tokenizer_source", "tokenizer")
_KEYS = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", *_TOKENIZER_KEYS)
_REFUSED = {
    "modules": "parts of a model with recipes of their own are not supported; merge with 'models', which takes all of "
    "a checkpoint's tensors",
    "chat_template": "is not written; leave it out, and put the template into the soup's tokenizer_config.json",
    "random_seed": "is no key but an option, here as in mergekit, which leaves it out; give --random-seed",
    "experts": "building a mixture of experts is not supported; use mergekit-moe",
    "gate_mode": "building a mixture of experts is not supported; use mergekit-moe",
}


def from_mergekit(config: str | Path | Mapping[str, Any], *, random_seed: int | None = None) -> Recipe:
    """Read a recipe of mergekit.

    Parameters
    ----------
    config : path, or mapping
        mergekit's YAML, or what a parser made of it. Models are folders or files, as seen from the
        current folder, or ids of the Hugging Face Hub.
    random_seed : int, optional
        For methods that drop at random, as mergekit's option of this name; the numbers are not those of mergekit.

    Returns
    -------
    Recipe

    Raises
    ------
    RecipeError
        If it says something that streamsoup does not do.
    """
    if not isinstance(config, str | Path):
        return _translate(config, random_seed)
    document = read_yaml(Path(config))
    try:
        return _translate(document, random_seed)
    except RecipeError as error:
        raise RecipeError(f"{config}: {error}") from error


def _translate(document: object, random_seed: int | None) -> Recipe:
    if not isinstance(document, Mapping):
        raise RecipeError("a mergekit recipe is a mapping with 'merge_method' and 'models'.")
    for key in document:
        if key in _REFUSED:
            raise RecipeError(f"{key}: {_REFUSED[key]}.")
        if key not in _KEYS:
            raise RecipeError(f"{key}: no key of a mergekit recipe. Known: {', '.join(_KEYS)}.")
    name = document.get("merge_method")
    if name not in _METHODS:
        raise RecipeError(
            f"merge_method: {name!r} is not one of {', '.join(_METHODS)}. For other methods use mergekit itself."
        )
    if bool(document.get("models")) == bool(document.get("slices")):
        raise RecipeError("models: give 'models' or 'slices', and not both.")
    base = None if document.get("base_model") is None else _model(document["base_model"], "base_model")
    shared = read_settings(document.get("parameters"), "parameters")
    if document.get("slices"):
        recipe = _of_slices(name, document["slices"], base, shared)
    else:
        recipe = _of_models(name, _entries(document["models"], "models"), base, shared)
    _check_tokenizer(document, recipe.checkpoints[0], has_base=base is not None)
    if random_seed is not None and name in RANDOM_METHODS:
        recipe = replace(recipe, parameters={**recipe.parameters, "seed": random_seed})
    return replace(recipe, dtype=_dtype(document))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A model with its own settings; `where` is for messages."""

    path: str
    own: Settings
    where: str


def _of_models(name: str, models: Sequence[_Entry], base: str | None, shared: Settings) -> Recipe:
    method = _METHODS[name]
    for i, entry in enumerate(models):
        if _is_among(entry.path, models[:i]):
            raise RecipeError(f"{entry.where}: {entry.path} is there twice. Name it once, with the sum of the weights.")
    if base is not None and method.base == NO_BASE:
        # mergekit adds it to the models, and takes configuration and tokenizer from it.
        first = [entry for entry in models if _same(entry.path, base)] or [_Entry(base, {}, "base_model")]
        models = [*first, *(entry for entry in models if not _same(entry.path, base))]
        base = None
    elif base is not None:
        models = [entry for entry in models if not _same(entry.path, base)]
    elif method.base == NEEDS_BASE:
        raise RecipeError(f"base_model: {name} needs one. Name the model that the others were fine-tuned from.")
    _check_count(name, len(models), has_base=base is not None)
    settings: Settings = _check_names(name, shared, "parameters", each=False)
    rows = []
    for entry in models:
        own = _check_names(name, entry.own, f"parameters of {entry.where}", each=True)
        rows.append(_ingredient(name, entry, own, settings))
    flags = {flag: read_flag(flag, settings.pop(flag, default)) for flag, default in method.flags.items()}
    settings.pop("weight", None)
    if method.required and method.required != "weight" and not covers(settings.get(method.required)):
        raise RecipeError(f"parameters: {name} needs {method.required} for every tensor. Add it, such as 0.5.")
    parameters = {**settings, **_ours(name, flags, settings)}
    parameters.pop("eps", None)
    normalize = flags["normalize"] if name == "linear" else True
    return Recipe(tuple(rows), normalize=normalize, method=name, base=base, parameters=parameters)


def _check_count(name: str, count: int, *, has_base: bool) -> None:
    method = _METHODS[name]
    if count < method.least or (method.most is not None and count > method.most):
        bound = "exactly" if method.least == method.most else "at least" if count < method.least else "at most"
        beside = " beside base_model" if has_base else ""
        number = method.least if count < method.least else method.most
        raise RecipeError(f"models: {name} takes {bound} {number}{beside}, not {count}.")


def _check_names(name: str, settings: Settings, where: str, *, each: bool) -> Settings:
    """Return the settings that have an effect; mergekit reads those for all models at the top only."""
    method = _METHODS[name]
    for key in settings:
        if each and key in (*method.shared, *method.flags):
            raise RecipeError(f"{where}: {key} is for all models together. Move it to the parameters at the top.")
        if key not in (*method.each, *method.shared, *method.flags, *method.unused):
            known = ", ".join((*method.each, *(() if each else (*method.shared, *method.flags)))) or "none"
            raise RecipeError(f"{where}: {key} is no parameter of {name}. Leave it out; known: {known}.")
    return {key: value for key, value in settings.items() if key not in method.unused}


def _ingredient(name: str, entry: _Entry, own: Settings, shared: Settings) -> Ingredient:
    if "weight" not in _METHODS[name].each:
        return Ingredient(entry.path, parameters=own)
    weight = joined(own.pop("weight", None), shared.get("weight"))
    if not covers(weight):
        raise RecipeError(
            f"parameters of {entry.where}: {name} needs a weight for every tensor of {entry.path}. Add one, or a last "
            "condition with a value and no filter."
        )
    if isinstance(weight, float):
        return Ingredient(entry.path, weight, own)
    return Ingredient(entry.path, parameters={**own, "weight": weight})


def _ours(name: str, flags: Mapping[str, bool], settings: Settings) -> Settings:
    """mergekit's flags in our words."""
    if name == "model_stock":
        return {"cosine": "pairs", **({"filter_wise": True} if flags["filter_wise"] else {})}
    if name == "nuslerp":
        if flags["nuslerp_row_wise"] and not flags["nuslerp_flatten"]:
            raise RecipeError(
                "parameters: nuslerp_row_wise: true interpolates columns, which is not supported. Leave it out: with "
                "nuslerp_flatten: false alone, rows are interpolated."
            )
        return {} if flags["nuslerp_flatten"] else {"row_wise": True}
    if name == "multislerp":
        if settings.get("eps", 1e-8) != 1e-8:
            raise RecipeError(f"parameters: eps {settings['eps']} is not supported: it is always 1e-8. Leave it out.")
        return {} if flags["normalize_weights"] else {"normalize_weights": False}
    found: Settings = {}
    if "rescale" in flags:
        found["rescale"] = "l1" if flags["rescale"] else "none"
    if "normalize" in flags and name != "linear":
        found["normalize"] = flags["normalize"]
    return found


def _of_slices(name: str, slices: object, base: str | None, shared: Settings) -> Recipe:
    if not isinstance(slices, list | tuple) or not all(isinstance(one, Mapping) for one in slices):
        raise RecipeError("slices: a list of mappings with 'sources'.")
    found = []
    for i, one in enumerate(slices):
        where = f"slices[{i}]"
        if unknown := set(one) - {"sources", "base_model", "parameters"}:
            raise RecipeError(f"{where}: {sorted(map(str, unknown))[0]} is not supported. Leave it out.")
        sources = _entries(one.get("sources"), f"{where}.sources")
        ranges = [_layer_range(row, entry.where) for row, entry in zip(one["sources"], sources, strict=True)]
        found.append((one, sources, ranges, read_settings(one.get("parameters"), f"parameters of {where}")))
    if name == "passthrough" and (len(found) > 1 or not _is_whole(found[0][1], found[0][2])):
        return _of_layers(found, base, shared)
    one, sources, ranges, own = found[0]
    if len(found) > 1 or not _is_whole(sources, ranges):
        raise RecipeError(
            f"slices: {name} of parts of models is not supported. Give 'models', or one slice with all layers; slices "
            "of several layers are put together by passthrough."
        )
    base = base if one.get("base_model") is None else _model(one["base_model"], "base_model of slices[0]")
    if base is not None and not _is_among(base, sources):
        raise RecipeError(f"base_model: {base} is not among the sources of slices[0]. Name it there too.")
    both = {key: joined(own.get(key), shared.get(key)) for key in {**shared, **own}}
    return _of_models(name, sources, base, both)


def _is_whole(sources: Sequence[_Entry], ranges: Sequence[tuple[int, int]]) -> bool:
    checkpoints = open_checkpoints([entry.path for entry in sources])
    return all(found == (0, layer_stack(one)[1]) for one, found in zip(checkpoints, ranges, strict=True))


def _of_layers(found: Sequence[Any], base: str | None, shared: Settings) -> Recipe:
    """One checkpoint of picked layers."""
    parts, settings = [], []
    for i, (one, sources, ranges, own) in enumerate(found):
        if len(sources) != 1 or one.get("base_model") is not None:
            raise RecipeError(f"slices[{i}]: passthrough takes one source and no base_model in each slice.")
        parts.append(Part(resolve(sources[0].path), *ranges[0]))
        mine = _check_names("passthrough", sources[0].own, f"parameters of {sources[0].where}", each=True)
        others = [_check_names("passthrough", s, "parameters", each=False) for s in (own, shared)]
        settings.append(joined(joined(mine.get("scale"), others[0].get("scale")), others[1].get("scale")))
    if base is not None and not _same(base, found[0][1][0].path):
        raise RecipeError(
            f"base_model: {base} is not the model of the first slice, {parts[0].path}, from which configuration and "
            "tokenizer are taken. Leave it out."
        )

    def scale(part: int, name: str, depth: float) -> float:
        given = {} if settings[part] is None else {"scale": settings[part]}
        return Parameters(given).number("scale", TensorInfo(name, (), depth), 1.0)

    conditions = scales_of(parts, scale)
    parameters = {"scale": conditions} if conditions else {}
    return Recipe((Ingredient(join_parts(parts)),), method="passthrough", parameters=parameters)


def _layer_range(row: Mapping[str, Any], where: str) -> tuple[int, int]:
    found = row.get("layer_range")
    if not isinstance(found, list | tuple) or len(found) != 2 or not all(type(n) is int for n in found):
        raise RecipeError(f"{where}: layer_range is a list of two whole numbers, not {found!r}.")
    return found[0], found[1]


def _entries(rows: object, where: str) -> list[_Entry]:
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(r, Mapping) and "model" in r for r in rows):
        raise RecipeError(f"{where}: a list of mappings with 'model'.")
    found = []
    for i, row in enumerate(rows):
        here = f"{where}[{i}]"
        known = ("model", "parameters", "layer_range") if where.endswith("sources") else ("model", "parameters")
        if unknown := [key for key in row if key not in known]:
            raise RecipeError(f"{here}: {unknown[0]} is not supported. Known: {', '.join(known)}.")
        own = read_settings(row.get("parameters"), f"parameters of {here}")
        found.append(_Entry(_model(row["model"], here), own, here))
    return found


def _model(given: object, where: str) -> str:
    """Return the path of a model."""
    reference: object = given
    if isinstance(given, Mapping):
        reference = given["model"] if isinstance(given.get("model"), str | Mapping) else given
        for key in ("lora", "override_architecture"):
            if given.get(key) is not None:
                raise RecipeError(f"{where}: {key} is not supported. Save the merged model in a folder and name that.")
        if isinstance(reference, Mapping):
            reference = reference.get("path")
    if not isinstance(reference, str) or not reference:
        raise RecipeError(f"{where}: a model is the path of a folder or file, not {given!r}.")
    if os.path.exists(reference):
        return reference
    if is_hub_id(reference):
        return absolute_path(reference)
    if "+" in reference:
        raise RecipeError(
            f"{where}: {reference} is a model with a LoRA adapter, which is not supported. Save the merged model in a "
            "folder and name that."
        )
    raise RecipeError(
        f"{where}: {reference} is no folder or file here, and no org/name of the Hugging Face Hub. Correct it."
    )


def _same(one: str, other: str) -> bool:
    return absolute_path(one) == absolute_path(other)


def _is_among(path: str, entries: Sequence[_Entry]) -> bool:
    return any(_same(path, entry.path) for entry in entries)


def _check_tokenizer(document: Mapping[str, Any], first: str, *, has_base: bool) -> None:
    """Let through what copying the first checkpoint's tokenizer does."""
    source, tokenizer, key = document.get("tokenizer_source"), document.get("tokenizer"), "tokenizer_source"
    if tokenizer is not None:
        if source is not None or not isinstance(tokenizer, Mapping) or set(tokenizer) - {"source"}:
            raise RecipeError(
                "tokenizer: new tokens and padded vocabularies are not supported. Leave it out; the tokenizer of the "
                "base (or of the first model) is copied."
            )
        source, key = tokenizer.get("source", "union"), "tokenizer"
    if source is None or (source == "base" and has_base):
        return
    if not isinstance(source, str) or source == "union" or not _same(source, first):
        raise RecipeError(
            f"{key}: {source!r} would rearrange embeddings, which is not supported. Leave it out; the tokenizer of "
            f"{first} is copied, and vocabularies must be equal."
        )


def _dtype(document: Mapping[str, Any]) -> str | None:
    found = None
    for key in ("dtype", "out_dtype"):
        if document.get(key) is not None:
            try:
                found = parse_float_dtype(str(document[key])).torch_name
            except RecipeError as error:
                raise RecipeError(f"{key}: {error}") from None
    return found
