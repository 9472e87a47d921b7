"""A tile of all checkpoints on a device of torch, to be measured and merged. Each answer is waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from streamsoup.backends.lanes import Lanes
from streamsoup.backends.protocol import Blend, Portion
from streamsoup.backends.values import TorchValues
from streamsoup.kernels import torch_combine, torch_measuring, triton_combine, triton_measuring
from streamsoup.measurement import SurveyPart
from streamsoup.tiling import BLOCK_ELEMENTS, piece_elements

T = TypeVar("T")
Sources = list[torch.Tensor]


class Reach(Protocol):
    """What a tile needs of its slot; see `TorchSlot`."""

    @property
    def lanes(self) -> Lanes: ...
    @property
    def most_elements(self) -> int: ...
    def bring(
        self, held: Sequence[torch.Tensor | None], itemsizes: Sequence[int], elements: int, begin: int, count: int
    ) -> Sources: ...
    def compute(self, function: Callable[[], T]) -> T: ...


class TorchTile:
    """See `merging.DeviceTile`."""

    def __init__(self, slot: Reach, held: Sequence[torch.Tensor | None], blend: Blend, portion: Portion) -> None:
        self.portion = portion
        self.blend = blend
        self.longest_look = piece_elements(len(blend.codes))
        self._slot = slot
        self._held = held

    def _of_sources(self, begin: int, count: int, function: Callable[[Sources], T]) -> T:
        sources = self._slot.bring(self._held, self.blend.itemsizes, self.portion.elements, begin, count)
        return self._slot.compute(lambda: function(sources))

    def _of_values(self, begin: int, count: int, function: Callable[[TorchValues], T]) -> T:
        def decoded(sources: Sources) -> T:
            rows = [torch_combine.widen(r, int(c)) for r, c in zip(sources, self.blend.codes, strict=True)]
            return function(TorchValues(torch.stack(rows), self.portion.tensor, self.portion.start + begin))

        return self._of_sources(begin, count, decoded)

    def _steps(self, begin: int, count: int, step: int) -> list[tuple[int, int]]:
        return [(at, min(step, begin + count - at)) for at in range(begin, begin + count, step)]

    def gram(self, begin: int, count: int, centre: int | None) -> npt.NDArray[np.float64]:
        """See `Looks`."""

        def fused(sources: Sources) -> npt.NDArray[np.float64]:
            return _here(triton_measuring.gram(sources, self.blend.codes.tolist(), centre))

        if triton_combine.is_available(self._slot.lanes.device):
            return self._of_sources(begin, count, fused)
        return self._of_values(begin, count, lambda values: _here(torch_measuring.gram(values.rows, centre)))

    def products(self, begin: int, count: int) -> npt.NDArray[np.float64]:
        """See `Looks`."""

        def products(values: TorchValues) -> npt.NDArray[np.float64]:
            return _here(torch_measuring.halves(values.rows[:-1] * values.rows[-1]).T)

        steps = self._steps(begin, count, self.longest_look)
        return np.concatenate([self._of_values(*step, products) for step in steps])

    def sums(self, begin: int, count: int, function: Callable[[Any], Any]) -> npt.NDArray[np.float64]:
        """See `Looks`."""
        return self._of_values(begin, count, lambda values: _here(torch_measuring.halves(function(values))))

    def counts(
        self, begin: int, count: int, function: Callable[[Any], Any], number: int, prefixes: npt.NDArray[np.uint32]
    ) -> npt.NDArray[np.int64]:
        """See `Looks`."""

        def counts(values: TorchValues) -> npt.NDArray[np.int64]:
            wanted = torch.from_numpy(prefixes.astype(np.int64)).to(values.rows.device)
            return _here(torch_measuring.histograms(function(values).float(), number, wanted))

        return self._of_values(begin, count, counts)

    def merge(
        self, begin: int, count: int, function: Callable[[Any], Any], out: memoryview
    ) -> tuple[npt.NDArray[np.int64], int]:
        """See `DeviceTile`."""

        def merged(values: TorchValues) -> tuple[npt.NDArray[np.int64], int, npt.NDArray[np.uint8]]:
            finite = values.rows.isfinite()
            raw = torch_combine.encode(function(values), self.blend.out_code)
            too_large = (torch_combine.bad(raw, self.blend.out_code) & finite.all(dim=0)).sum()
            return _here((~finite).sum(dim=1)), int(too_large), _here(raw)

        nonfinite, too_large, raw = self._of_values(begin, count, merged)
        np.frombuffer(out, np.uint8)[:] = raw
        return nonfinite, too_large

    def survey(self, begin: int, count: int, part: SurveyPart) -> npt.NDArray[np.float64]:
        """See `DeviceTile`."""

        def survey(values: TorchValues) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
            nonfinite = _here((~values.rows.isfinite()).sum(dim=1))
            return nonfinite, _here(torch_measuring.survey(values.rows, based=part.based))

        found = []
        for step in self._steps(begin, count, self.longest_look):
            part.digests += self._digests(*step)
            nonfinite, blocks = self._of_values(*step, survey)
            part.nonfinite += nonfinite
            found.append(blocks)
        return np.concatenate(found)

    def digests(self) -> npt.NDArray[np.uint64]:
        """See `DeviceTile`."""
        total = np.zeros(len(self.blend.codes), np.uint64)
        for step in self._steps(0, self.portion.elements, self._slot.most_elements):
            total += self._digests(*step)
        return np.where(self.blend.hashed, total, np.uint64(0))

    def _digests(self, begin: int, count: int) -> npt.NDArray[np.uint64]:
        first = (self.portion.start + begin) // BLOCK_ELEMENTS

        def digests(sources: Sources) -> npt.NDArray[np.uint64]:
            found = [torch_combine.digest(r, n, first) for r, n in zip(sources, self.blend.itemsizes, strict=True)]
            return _here(torch.stack(found)).view(np.uint64)

        return self._of_sources(begin, count, digests)


def _here(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Wait for a tensor, and return it as an array."""
    return np.asarray(tensor.cpu().numpy())
