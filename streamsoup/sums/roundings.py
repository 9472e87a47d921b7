"""Would the roundings of a running sum show in its soup? Asked of what ever entered it, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from streamsoup.dtypes import DType
from streamsoup.sums.exactness import Entered, Extent, is_exact, is_plain
from streamsoup.sums.members import Member, divisor_of, is_multiple

_DIGITS = {"SUM64": 53, "SUM32": 24}


class Roundings:
    """What is known of the terms of one sum.

    Parameters
    ----------
    sum_dtype : DType
        Of the sum.

    Attributes
    ----------
    extents : dict of str to Extent
        Of the ingredients that were measured, by path.
    entered : dict of str to Entered
        With which weights ingredients entered or left, by path.
    """

    def __init__(self, sum_dtype: DType) -> None:
        self._sum_dtype = sum_dtype
        self.extents: dict[str, Extent] = {}
        self.entered: dict[str, Entered] = {}

    @property
    def is_exact(self) -> bool:
        """Whether a sum that is no double-double is what its soup is made of: float64 is, float32 where it is exact."""
        return self._sum_dtype.name == "SUM64" or is_exact(self.entered, self.extents, digits=24)

    def is_exact_pair(self, paths: Sequence[str], narrow: npt.NDArray[np.bool_]) -> bool:
        """Whether a double-double sum is what its soup is made of.

        Parameters
        ----------
        paths : sequence of str
            Its members.
        narrow : bool array, shape (tensors,)
            Tensors that the soup sums in float64.
        """
        return is_plain(paths, self.extents) and (
            not narrow.any() or is_exact(self.entered, self.extents, digits=53, only=narrow)
        )

    def entering(self, members: tuple[Member, ...], path: str, weight: float) -> dict[str, Entered]:
        """With which weights ingredients entered once one more has."""
        # The merged weight counts too: the recipe adds it at once. Those of the others have entered already.
        weights = (weight, *(m.weight for m in members if m.path == path))
        before = self.entered.get(path)
        return {**self.entered, path: Entered.of(*weights) if before is None else before.also(*weights)}

    def divides(self, members: tuple[Member, ...], entered: dict[str, Entered]) -> bool:
        """Whether the sum is that of their soup, or an exact multiple with an exact divisor."""
        return not is_multiple(members) or (divisor_of(members)[1] == 0.0 and self.commutes(entered))

    def commutes(self, entered: dict[str, Entered]) -> bool:
        """Whether these terms have the same sum in any order, so that adding and removing leave no trace."""
        digits = _DIGITS.get(self._sum_dtype.name)
        return digits is not None and is_exact(entered, self.extents, digits=digits)
