"""What a kernel is told about a group of ingredients, and which kernel it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from streamsoup.backends.protocol import Blend
from streamsoup.kernels import codes, torch_combine, triton_combine
from streamsoup.tiling import PARTIAL_ITEMSIZE

# Digests and counts of the sources, and how many results are too large.
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Group:
    """What a kernel is told about a group of ingredients, after the partial sum of those before them.

    Attributes
    ----------
    codes, weights, hashed : tuple
        Of the sources.
    itemsizes : tuple of int
        Of the ingredients alone.
    divisor : tuple of two floats
    out_code, out_itemsize : int
    wide, single : bool
    carried : int
        How many sources are partial sums: 0 or 1.
    first, stop, count : int
        Which ingredients, of how many.
    """

    codes: tuple[int, ...]
    weights: tuple[float, ...]
    hashed: tuple[bool, ...]
    itemsizes: tuple[int, ...]
    divisor: tuple[float, float]
    out_code: int
    out_itemsize: int
    wide: bool
    carried: int
    first: int
    stop: int
    count: int
    single: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the tile is finished with it."""
        return self.stop == self.count

    @staticmethod
    def of(blend: Blend, first: int, stop: int) -> Group:
        """Gather the numbers of ingredients from `first` to `stop`."""
        carried, last = int(first > 0), stop == len(blend.weights)
        return Group(
            codes=(codes.F64,) * carried + tuple(blend.codes[first:stop].tolist()),
            weights=(1.0,) * carried + tuple(blend.weights[first:stop].tolist()),
            hashed=(False,) * carried + tuple(blend.hashed[first:stop].astype(bool).tolist()),
            itemsizes=blend.itemsizes[first:stop],
            divisor=blend.divisor if last else (1.0, 0.0),
            out_code=blend.out_code if last else codes.F64,
            out_itemsize=blend.out_itemsize if last else PARTIAL_ITEMSIZE,
            wide=blend.wide,
            carried=carried,
            first=first,
            stop=stop,
            count=len(blend.weights),
            single=blend.single,
        )


def combine_into(out: torch.Tensor, sources: list[torch.Tensor], group: Group, first_block: int) -> Found:
    """Combine sources with the best kernel for their device: results are left in `out`, the rest is returned."""
    if not group.wide and triton_combine.is_available(out.device):
        _, digests, nonfinite, overflowed = triton_combine.combine(
            sources,
            list(group.codes),
            list(group.weights),
            group.divisor[0],
            first_block,
            group.out_code,
            list(group.hashed),
            out,
            single=group.single,
        )
        return digests, nonfinite, overflowed
    function: Any = torch_combine.combine_wide if group.wide else partial(torch_combine.combine, single=group.single)
    divisor = group.divisor if group.wide else group.divisor[:1]
    raw, digests, nonfinite, overflowed = function(
        sources, list(group.codes), list(group.weights), *divisor, first_block, group.out_code, list(group.hashed)
    )
    out.copy_(raw)
    return digests, nonfinite, overflowed
