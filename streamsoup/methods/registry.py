"""Methods by name: how they are made of what a recipe gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamsoup.errors import RecipeError
from streamsoup.methods import fixed, spherical
from streamsoup.methods.catalogue import METHODS, NEEDS_BASE, NO_BASE
from streamsoup.methods.fisher import Fisher
from streamsoup.methods.fixed import Fixed
from streamsoup.methods.linear import Convert
from streamsoup.methods.median import GeometricMedian
from streamsoup.methods.model_stock import FilterwiseModelStock, ModelStock
from streamsoup.methods.parameters import Parameters
from streamsoup.methods.protocol import Method
from streamsoup.methods.sce import Sce
from streamsoup.methods.spherical import RowNuslerp, Spherical
from streamsoup.methods.task_vectors import RESCALES, TaskVectors


@dataclass(frozen=True, slots=True)
class Given:
    """What a recipe gives a method.

    Attributes
    ----------
    name : str
    weights : tuple of float
        Of the ingredients, without the base.
    normalize : bool
        For `linear`; other methods have a parameter of this name.
    has_base : bool
    parameters : Parameters
    """

    name: str
    weights: tuple[float, ...]
    normalize: bool
    has_base: bool
    parameters: Parameters

    def normalizes(self, default: bool) -> bool:
        """Whether to divide by the sum of the weights."""
        return self.normalize if self.name == "linear" else self.parameters.flag("normalize", default)


def _fixed(
    formula: Callable[..., tuple[tuple[float, ...], bool]], *, normalize: bool = True
) -> Callable[[Given], Method]:
    return lambda g: Fixed(g.name, g.weights, g.parameters, g.normalizes(normalize), formula)


def _spherical(formula: Callable[..., spherical.Numbers]) -> Callable[[Given], Method]:
    return lambda g: Spherical(g.name, g.weights, g.parameters, g.has_base, formula)


def _slerp(given: Given) -> Method:
    # The base is one of the two ends, not an origin.
    return Spherical(given.name, given.weights, given.parameters, False, spherical.slerp)


def _nuslerp(given: Given) -> Method:
    if given.parameters.flag("row_wise", False):
        return RowNuslerp(given.name, given.weights, given.parameters, given.has_base, spherical.nuslerp)
    return _spherical(spherical.nuslerp)(given)


def _model_stock(given: Given) -> Method:
    kind = FilterwiseModelStock if given.parameters.flag("filter_wise", False) else ModelStock
    return kind(len(given.weights), given.parameters)


def _vectors(thin: str, *, elect: bool, normalize: bool, rescale: str) -> Callable[[Given], Method]:
    def make(given: Given) -> Method:
        chosen = given.parameters.word("rescale", rescale, RESCALES)
        return TaskVectors(
            given.name, given.weights, given.parameters, thin, elect, given.normalizes(normalize), chosen
        )

    return make


_MAKERS: dict[str, Callable[[Given], Method]] = {
    "linear": _fixed(fixed.weighted),
    "wise_ft": _fixed(fixed.wise_ft),
    "task_arithmetic": _fixed(fixed.task_arithmetic, normalize=False),
    "ema": _fixed(fixed.ema),
    "passthrough": _fixed(fixed.passthrough),
    "convert": lambda g: Convert(),
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _spherical(spherical.multislerp),
    "karcher": _spherical(spherical.karcher),
    "geometric_median": lambda g: GeometricMedian(g.weights, g.parameters),
    "model_stock": _model_stock,
    "ties": _vectors("magnitude", elect=True, normalize=True, rescale="none"),
    "dare_linear": _vectors("random", elect=False, normalize=False, rescale="probability"),
    "dare_ties": _vectors("random", elect=True, normalize=False, rescale="probability"),
    "della": _vectors("ranked", elect=True, normalize=True, rescale="probability"),
    "della_linear": _vectors("ranked", elect=False, normalize=False, rescale="probability"),
    "breadcrumbs": _vectors("outliers", elect=False, normalize=False, rescale="none"),
    "breadcrumbs_ties": _vectors("outliers", elect=True, normalize=False, rescale="none"),
    "sce": lambda g: Sce(len(g.weights), g.parameters),
    "fisher": lambda g: Fisher(g.weights, g.parameters),
}


def make_method(given: Given) -> Method:
    """Make a method by its name.

    Raises
    ------
    RecipeError
        If there is none, or it takes other ingredients or parameters.
    """
    entry = METHODS.get(given.name)
    if entry is None or given.name not in _MAKERS:
        raise RecipeError(f"method {given.name!r} is not one of {', '.join(METHODS)}.")
    count = len(given.weights)
    if entry.base == NEEDS_BASE and not given.has_base:
        raise RecipeError(
            f"Method {given.name} needs a base: the checkpoint that all were fine-tuned from. Give --base."
        )
    if entry.base == NO_BASE and given.has_base:
        raise RecipeError(f"Method {given.name} takes no base. Leave it out, or name it among the ingredients.")
    least, most = entry.least, entry.most
    if given.name == "slerp":
        least = most = 1 if given.has_base else 2
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        beside = " beside the base" if given.has_base else ""
        raise RecipeError(f"Method {given.name} takes {wanted} ingredient(s){beside}, not {count}.")
    if "weight" not in entry.each and any(weight != 1.0 for weight in given.weights):
        raise RecipeError(f"Method {given.name} takes no weights. Leave them out.")
    if "weight" in given.parameters.shared and any(weight != 1.0 for weight in given.weights):
        raise RecipeError("weight: is given for all ingredients and for each. Give one of them.")
    given.parameters.check(entry.shared, entry.each, given.name)
    return _MAKERS[given.name](given)
