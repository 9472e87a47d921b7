"""The methods by name: what each takes. Imports nothing heavy: a help text is made of it."""

from __future__ import annotations

from dataclasses import dataclass

NO_BASE, MAY_HAVE_BASE, NEEDS_BASE = "no base", "a base or none", "a base"


@dataclass(frozen=True, slots=True)
class Entry:
    """One method.

    Attributes
    ----------
    what : str
        For a list of methods.
    base : str
    shared, each : tuple of str
        Parameters for all, and those that each ingredient may have its own of.
    least, most : int or None
        How many ingredients it takes, without the base.
    """

    what: str
    base: str
    shared: tuple[str, ...] = ()
    each: tuple[str, ...] = ("weight",)
    least: int = 1
    most: int | None = None


_VECTORS = ("lambda", "rescale", "normalize")
_CHANCE = (*_VECTORS, "seed")
_THINNED = ("weight", "density")
_RANKED = (*_THINNED, "epsilon")
_OUTLIERS = (*_THINNED, "gamma")

METHODS: dict[str, Entry] = {
    "linear": Entry("weighted average, or coefficients as given", NO_BASE),
    "wise_ft": Entry("(1 - alpha) base + alpha checkpoint", NEEDS_BASE, ("alpha",), (), most=1),
    "task_arithmetic": Entry(
        "base + lambda times the sum of weight (checkpoint - base)", NEEDS_BASE, ("lambda", "normalize")
    ),
    "ema": Entry("exponential moving average in the given order", NO_BASE, ("decay",), ()),
    # These two are the uniform soups of the latest checkpoints: see `Recipe`.
    "swa": Entry("mean of all checkpoints from number start on", NO_BASE, ("start",), ()),
    "lawa": Entry("mean of the last window checkpoints", NO_BASE, ("window",), ()),
    "passthrough": Entry("one checkpoint, scaled", NO_BASE, (), ("scale",), most=1),
    "convert": Entry("one checkpoint, copied bit for bit where its dtype stays", NO_BASE, (), (), most=1),
    "slerp": Entry("great circle from the first (or the base) to the second", MAY_HAVE_BASE, ("t",), (), 1, 2),
    "nuslerp": Entry("SLERP by weights, of tensors or of rows", MAY_HAVE_BASE, ("row_wise",), least=2, most=2),
    "multislerp": Entry("mean in a tangent space of the sphere", MAY_HAVE_BASE, ("normalize_weights",), least=2),
    "karcher": Entry("Karcher mean on the sphere", MAY_HAVE_BASE, ("max_iter", "tol"), least=2),
    "geometric_median": Entry(
        "point with the least sum of distances", NO_BASE, ("max_iter", "tol", "smoothing"), least=2
    ),
    "model_stock": Entry(
        "between mean and base, by the angle of the checkpoints", NEEDS_BASE, ("cosine", "filter_wise"), (), 2
    ),
    "ties": Entry("trim, elect signs, average what agrees", NEEDS_BASE, (*_VECTORS, "scope"), _THINNED),
    "dare_linear": Entry("drop at random and rescale, add", NEEDS_BASE, _CHANCE, _THINNED),
    "dare_ties": Entry("drop at random and rescale, elect signs", NEEDS_BASE, _CHANCE, _THINNED),
    "della": Entry("drop at random by rank in a row, elect signs", NEEDS_BASE, _CHANCE, _RANKED),
    "della_linear": Entry("drop at random by rank in a row, add", NEEDS_BASE, _CHANCE, _RANKED),
    "breadcrumbs": Entry("drop the smallest and the largest, add", NEEDS_BASE, _VECTORS, _OUTLIERS),
    "breadcrumbs_ties": Entry("drop the smallest and the largest, elect signs", NEEDS_BASE, _VECTORS, _OUTLIERS),
    "sce": Entry("select by variance, weigh by size, elect signs", NEEDS_BASE, ("select_topk",), ()),
    "fisher": Entry("average weighted by importances, one of them for each", NO_BASE),
}


def describe_methods() -> str:
    """List methods, a line or two each."""
    lines = []
    for name, entry in METHODS.items():
        takes = ", ".join((*entry.each, *entry.shared))
        base = {NEEDS_BASE: "base", MAY_HAVE_BASE: "base or none"}.get(entry.base)
        lines.append(f"    {name:<16} {entry.what}")
        if said := "; ".join(part for part in (base, takes) if part):
            lines.append(f"        {said}")
    return "\n".join(lines)
