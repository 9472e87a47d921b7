"""The figures of a comparison: all from inner products of differences, and of the checkpoints themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

LINEAGE_FACTOR = 5.0
"""An ingredient so many times farther from the others than they are from one another looks like another lineage."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Some tensors of all ingredients: a layer, or the whole.

    Attributes
    ----------
    elements : int
        Float elements that were counted.
    left_out : int
        Tensors that were not, since an ingredient (or the base) has NaN, infinity or numbers too large to square there.
    based : bool
        Whether differences are from the base; else from the mean of the ingredients.
    gram : float64 array, shape (ingredients, ingredients)
        Inner products of the differences.
    products : float64 array, shape (ingredients, ingredients)
        Inner products of the weights themselves.
    varying, moved, conflicts : int
        Elements that are not the same in all ingredients; in which one differs from the base; in which two differ
        from it in opposite directions.
    """

    elements: int
    left_out: int
    based: bool
    gram: Numbers
    products: Numbers
    varying: int
    moved: int
    conflicts: int

    @staticmethod
    def of(
        measured: Numbers, *, based: bool, elements: int, left_out: int, varying: int, moved: int, conflicts: int
    ) -> Figures:
        """Make the figures of what `streamsoup.measurement.Surveyed` holds, or of sums of it."""
        with np.errstate(invalid="ignore"):
            across, size = measured[0].copy(), measured[0, 0]
            across[0] = 0.0
            differences = measured.copy()
            differences[0] = differences[:, 0] = 0.0
            products = differences + across[:, None] + across + size
            first = int(based)
            differences, products = differences[first:, first:], products[first:, first:]
            gram = differences if based else _centred(differences)
        return Figures(elements, left_out, based, gram, products, varying, moved, conflicts)

    @property
    def norms(self) -> Numbers:
        """Norms of the weights, shape (ingredients,)."""
        return _roots(np.diag(self.products))

    @property
    def to_base(self) -> Numbers | None:
        """Distances to the base, shape (ingredients,)."""
        return _roots(np.diag(self.gram)) if self.based else None

    @property
    def to_mean(self) -> Numbers:
        """Distances to the mean of the ingredients, shape (ingredients,)."""
        with np.errstate(invalid="ignore"):
            return _roots(np.diag(_centred(self.gram)))

    @property
    def distances(self) -> Numbers:
        """Distances between ingredients, shape (ingredients, ingredients)."""
        squares = np.diag(self.gram)
        with np.errstate(invalid="ignore"):
            return _roots(squares[:, None] + squares - 2 * self.gram)

    @property
    def cosines(self) -> Numbers:
        """Cosines between the differences, shape (ingredients, ingredients); NaN where there is no difference."""
        return _cosines(self.gram)

    @property
    def weight_cosines(self) -> Numbers:
        """Cosines between the weights themselves, shape (ingredients, ingredients)."""
        return _cosines(self.products)

    @property
    def mean_cosines(self) -> Numbers:
        """Mean of each ingredient's cosines with the others, shape (ingredients,)."""
        cosines = self.cosines.copy()
        np.fill_diagonal(cosines, np.nan)
        known = ~np.isnan(cosines)
        return _ratio(np.where(known, cosines, 0.0).sum(axis=1), known.sum(axis=1))

    @property
    def variance(self) -> float:
        """Variance between the ingredients, the mean over all elements."""
        return _share(float((self.to_mean**2).sum()), len(self.gram) * self.elements)

    @property
    def relative_spread(self) -> float:
        """Root mean square distance to the mean over that of the weights."""
        total = float((self.norms**2).sum())
        return math.sqrt(float((self.to_mean**2).sum()) / total) if total > 0 else 0.0

    @property
    def conflict_share(self) -> float | None:
        """Share of the elements that differ from the base in opposite directions."""
        return _share(self.conflicts, self.elements) if self.based else None

    def to_json(self) -> dict[str, Any]:
        """Plain data; None for what is no number."""
        return {
            "elements": self.elements,
            "left_out_tensors": self.left_out,
            "norms": plain(self.norms),
            "distances_to_base": plain(self.to_base),
            "distances_to_mean": plain(self.to_mean),
            "distances": plain(self.distances),
            "cosines": plain(self.cosines),
            "mean_cosines": plain(self.mean_cosines),
            "weight_cosines": plain(self.weight_cosines),
            "gram": plain(self.gram),
            "variance": plain(self.variance),
            "relative_spread": plain(self.relative_spread),
            "varying_elements": self.varying,
            "moved_elements": self.moved if self.based else None,
            "conflicting_elements": self.conflicts if self.based else None,
            "conflict_share": self.conflict_share,
        }


def number(value: float) -> str:
    """Write a number with four digits."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def column(values: Numbers) -> list[str]:
    """Write norms or distances with as many decimals as give the largest four digits."""
    numbers = values.tolist()
    largest = max((v for v in numbers if math.isfinite(v)), default=0.0)
    if not 1e-3 <= largest < 1e6:
        return [number(v) for v in numbers]
    decimals = max(0, 3 - math.floor(math.log10(largest)))
    return ["-" if math.isnan(v) else f"{v:.{decimals}f}" for v in numbers]


def signed(value: float, digits: int) -> str:
    """Write a cosine."""
    return "-" if math.isnan(value) else f"{round(float(value), digits) + 0.0:+.{digits}f}"


def typeset(text: str) -> str:
    """Write a minus as a minus, and nothing as a dash."""
    return "–" if text == "-" else text.replace("-", "−")


def plain(value: Any) -> Any:
    """Turn arrays into lists, and what is no number into None."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def classical_map(figures: Figures, left_out: tuple[bool, ...]) -> tuple[Numbers, float]:
    """Place the ingredients (and the base, last) in a plane so that their distances are kept as well as can be.

    Parameters
    ----------
    figures : Figures
    left_out : tuple of bool
        Ingredients that would only squeeze the others together.

    Returns
    -------
    points : float64 array, shape (ingredients, 2), or with the base (ingredients + 1, 2)
        The mean of the ingredients is the origin; NaN for those that are left out.
    share : float
        Of all squared distances to the mean point, what the plane shows.

    Notes
    -----
    Source: classical multidimensional scaling (Torgerson 1952).
    """
    shown = np.flatnonzero(~np.array(left_out))
    points = np.full((len(left_out) + figures.based, 2), np.nan)
    gram = np.pad(figures.gram[np.ix_(shown, shown)], (0, int(figures.based)))
    values, vectors = np.linalg.eigh(_centred(gram))
    values = np.maximum(values[::-1], 0.0)
    plane = vectors[:, ::-1][:, :2] * np.sqrt(values[:2])
    for axis in plane.T:  # eigenvectors have no sign of their own
        axis *= -1 if axis[np.argmax(abs(axis))] < 0 else 1
    plane -= plane[: len(shown)].mean(axis=0)
    points[[*shown.tolist(), *range(len(left_out), len(points))]] = plane
    return points, _share(float(values[:2].sum()), float(values.sum()))


def other_lineages(distances: Numbers, twin_of: tuple[int | None, ...]) -> tuple[bool, ...]:
    """Tell which ingredients are much farther from the others than those are from one another.

    Parameters
    ----------
    distances : float64 array, shape (ingredients, ingredients)
    twin_of : tuple of int or None
        An earlier ingredient that each is identical to; copies count once.

    Notes
    -----
    An ingredient's distance to the others is the (lower) median, and so is what is usual: the majority decides, and
    of two halves neither is another lineage. Source: own.
    """
    distinct = [i for i, twin in enumerate(twin_of) if twin is None]
    found = np.zeros(len(twin_of), bool)
    if len(distinct) >= 3 and np.isfinite(distances).all():
        own = np.array([_low_median(np.delete(distances[i, distinct], n)) for n, i in enumerate(distinct)])
        found[distinct] = own > LINEAGE_FACTOR * _low_median(own)
    return tuple(bool(found[i if twin is None else twin]) for i, twin in enumerate(twin_of))


def _low_median(values: Numbers) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def _centred(gram: Numbers) -> Numbers:
    """Inner products of differences from the mean. By way of the first, so that equal ones are at distance zero."""
    from_first = gram - gram[:, :1] - gram[:1] + gram[0, 0]
    means = from_first.mean(axis=1)
    return np.asarray(from_first - means[:, None] - means + means.mean())


def _roots(squares: Numbers) -> Numbers:
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def _cosines(products: Numbers) -> Numbers:
    norms = _roots(np.diag(products))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.clip(_ratio(products, norms[:, None] * norms), -1.0, 1.0))


def _ratio(above: Numbers, below: Any) -> Numbers:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(below > 0, above / below, np.nan))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
