"""The torch backend: plain torch operations on any device, bit-identical to the CPU's kernels.

It runs on ``cuda`` and, for tests, on torch's own ``cpu``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from streamsoup.backends import merging
from streamsoup.backends.protocol import Blend, Combined, Finished, Portion, Token
from streamsoup.errors import RecipeError
from streamsoup.kernels import codes
from streamsoup.measurement import Part, SurveyPart
from streamsoup.methods.protocol import Elementwise
from streamsoup.tiling import BLOCK_ELEMENTS, Tiling, piece_elements

if TYPE_CHECKING:
    import torch

    from streamsoup.backends.values import TorchValues


class TorchToken:
    """Work that was queued on a device; `result` waits for it."""

    def __init__(self, slot: TorchSlot, output: torch.Tensor, overflowed: int, into: memoryview | None) -> None:
        self._slot = slot
        self._output = output
        self._overflowed = overflowed
        self._into = into

    def result(self) -> Combined:
        """See `Token`."""
        slot = self._slot
        output = slot.output(self._output.numel()) if self._into is None else self._into
        np.frombuffer(output, np.uint8)[:] = self._output.cpu().numpy()
        return Combined(output, slot.digests, slot.nonfinite, self._overflowed)


class TorchSlot:
    """See `Slot`. Staging buffers are page-locked where the device is a GPU."""

    def __init__(
        self, device: torch.device, tiling: Tiling, *, in_itemsize: int, out_itemsize: int, ingredients: int
    ) -> None:
        import torch

        pinned = device.type == "cuda"
        stride = tiling.tile_elements * in_itemsize
        self._device = device
        self._staging = [torch.empty(stride, dtype=torch.uint8, pin_memory=pinned) for _ in range(tiling.group)]
        self._output = torch.empty(tiling.tile_elements * out_itemsize, dtype=torch.uint8, pin_memory=pinned)
        self._partial: torch.Tensor | None = None
        self._overflowed = 0
        self.digests = np.zeros(ingredients, np.uint64)
        self.nonfinite = np.zeros(ingredients, np.int64)

    def staging(self, index: int, nbytes: int) -> memoryview | None:
        """See `Slot`."""
        return self._staging[index][:nbytes].numpy().data

    def output(self, nbytes: int) -> memoryview:
        """See `Slot`."""
        return self._output[:nbytes].numpy().data

    def combine(
        self,
        addresses: Sequence[int],
        blend: Blend,
        first: int,
        elements: int,
        first_block: int,
        into: memoryview | None = None,
    ) -> Token | None:
        """See `Slot`. The bytes are taken from the staging buffers, whatever their addresses."""
        from streamsoup.kernels import torch_combine, triton_combine

        stop = first + len(addresses)
        last = stop == len(blend.weights)
        if first == 0:
            self.digests[:] = 0
            self.nonfinite[:] = 0
            self._overflowed = 0
        sources = [
            self._staging[i][: elements * blend.itemsizes[first + i]].to(self._device, non_blocking=True)
            for i in range(len(addresses))
        ]
        kinds = blend.codes[first:stop].tolist()
        weights = blend.weights[first:stop].tolist()
        carried = 0
        if first:
            assert self._partial is not None
            sources.insert(0, self._partial)
            kinds.insert(0, codes.F64)
            weights.insert(0, 1.0)
            carried = 1
        divisor = blend.divisor if last else (1.0, 0.0)
        plain = triton_combine if triton_combine.is_available(self._device) else torch_combine
        function: Any = torch_combine.combine_wide if blend.wide else plain.combine
        output, digests, nonfinite, overflowed = function(
            sources,
            kinds,
            weights,
            *(divisor if blend.wide else divisor[:1]),
            first_block,
            blend.out_code if last else codes.F64,
            [False] * carried + blend.hashed[first:stop].astype(bool).tolist(),
        )
        self.digests[first:stop] += digests.cpu().numpy().view(np.uint64)[carried:]
        self.nonfinite[first:stop] += nonfinite.cpu().numpy()[carried:]
        # An element that overflowed in an earlier group is not counted again: its partial sum is no longer finite.
        self._overflowed += int(overflowed)
        if not last:
            self._partial = output
            return None
        self._partial = None
        return TorchToken(self, output, self._overflowed, into)

    def look(self, addresses: Sequence[int], blend: Blend, portion: Portion, part: Part) -> None:
        """See `Slot`."""
        merging.look(self._tile(blend, portion), part)

    def merge(
        self,
        addresses: Sequence[int],
        blend: Blend,
        portion: Portion,
        rule: Elementwise,
        into: memoryview | None = None,
    ) -> Token:
        """See `Slot`."""
        output = into if into is not None else self.output(portion.elements * blend.out_itemsize)
        return Finished(merging.merge(self._tile(blend, portion), rule, output))

    def _tile(self, blend: Blend, portion: Portion) -> _TorchTile:
        sources = [self._staging[i][: portion.elements * n].to(self._device) for i, n in enumerate(blend.itemsizes)]
        return _TorchTile(sources, portion, blend, self._device)


class _TorchTile:
    """See `merging.DeviceTile`."""

    def __init__(self, sources: list[torch.Tensor], portion: Portion, blend: Blend, device: torch.device) -> None:
        self.portion = portion
        self.blend = blend
        self.longest_look = piece_elements(len(sources))
        self._sources = sources
        self._device = device

    def _values(self, begin: int, count: int) -> TorchValues:
        import torch

        from streamsoup.backends.values import TorchValues
        from streamsoup.kernels import torch_combine

        rows = [
            torch_combine.widen(raw[begin * n : (begin + count) * n], int(code))
            for raw, n, code in zip(self._sources, self.blend.itemsizes, self.blend.codes, strict=True)
        ]
        return TorchValues(torch.stack(rows), self.portion.tensor, self.portion.start + begin)

    def gram(self, begin: int, count: int, centre: int | None) -> npt.NDArray[np.float64]:
        """See `Looks`."""
        from streamsoup.kernels import torch_measuring, triton_combine, triton_measuring

        if triton_combine.is_available(self._device):
            stop, sizes = begin + count, self.blend.itemsizes
            raws = [raw[begin * n : stop * n] for raw, n in zip(self._sources, sizes, strict=True)]
            return np.asarray(triton_measuring.gram(raws, self.blend.codes.tolist(), centre).cpu().numpy())
        return np.asarray(torch_measuring.gram(self._values(begin, count).rows, centre).cpu().numpy())

    def products(self, begin: int, count: int) -> npt.NDArray[np.float64]:
        """See `Looks`."""
        from streamsoup.kernels import torch_measuring

        step = self.longest_look
        pieces = [self._values(at, min(step, begin + count - at)).rows for at in range(begin, begin + count, step)]
        found = [torch_measuring.halves(rows[:-1] * rows[-1]).T.cpu().numpy() for rows in pieces]
        return np.concatenate(found)

    def sums(self, begin: int, count: int, function: Callable[[Any], Any]) -> npt.NDArray[np.float64]:
        """See `Looks`."""
        from streamsoup.kernels import torch_measuring

        return np.asarray(torch_measuring.halves(function(self._values(begin, count))).cpu().numpy())

    def counts(
        self, begin: int, count: int, function: Callable[[Any], Any], number: int, prefixes: npt.NDArray[np.uint32]
    ) -> npt.NDArray[np.int64]:
        """See `Looks`."""
        import torch

        from streamsoup.kernels import torch_measuring

        wanted = torch.from_numpy(prefixes.astype(np.int64)).to(self._device)
        keys = function(self._values(begin, count)).float()
        return np.asarray(torch_measuring.histograms(keys, number, wanted).cpu().numpy())

    def merge(
        self, begin: int, count: int, function: Callable[[Any], Any], out: memoryview
    ) -> tuple[npt.NDArray[np.int64], int]:
        """See `DeviceTile`."""
        from streamsoup.kernels import torch_combine

        values = self._values(begin, count)
        finite = values.rows.isfinite()
        raw = torch_combine.encode(function(values), self.blend.out_code)
        np.frombuffer(out, np.uint8)[:] = raw.cpu().numpy()
        too_large = int((torch_combine.bad(raw, self.blend.out_code) & finite.all(dim=0)).sum())
        return np.asarray((~finite).sum(dim=1).cpu().numpy()), too_large

    def survey(self, begin: int, count: int, part: SurveyPart) -> npt.NDArray[np.float64]:
        """See `DeviceTile`."""
        from streamsoup.kernels import torch_combine, torch_measuring

        first = (self.portion.start + begin) // BLOCK_ELEMENTS
        for k, (raw, size) in enumerate(zip(self._sources, self.blend.itemsizes, strict=True)):
            digest = torch_combine.digest(raw[begin * size : (begin + count) * size], size, first)
            part.digests[k] += np.uint64(int(digest) % 2**64)
        found = []
        for at in range(begin, begin + count, self.longest_look):
            rows = self._values(at, min(self.longest_look, begin + count - at)).rows
            part.nonfinite += (~rows.isfinite()).sum(dim=1).cpu().numpy()
            found.append(torch_measuring.survey(rows, based=part.based).cpu().numpy())
        return np.concatenate(found)

    def digests(self) -> npt.NDArray[np.uint64]:
        """See `DeviceTile`."""
        from streamsoup.kernels import torch_combine

        first = self.portion.start // BLOCK_ELEMENTS
        return np.array(
            [
                int(torch_combine.digest(raw, size, first)) % 2**64 if hashed else 0
                for raw, size, hashed in zip(self._sources, self.blend.itemsizes, self.blend.hashed, strict=True)
            ],
            np.uint64,
        )


class TorchBackend:
    """See `Backend`.

    Parameters
    ----------
    device : str
        Any device of torch.

    Raises
    ------
    RecipeError
        If torch cannot use it.
    """

    def __init__(self, device: str) -> None:
        import torch

        try:
            self._device = torch.device(device)
            torch.empty(1, device=self._device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise RecipeError(f"device {device!r} cannot be used here ({reason}). Use --device cpu.") from error
        self.name = str(self._device)

    def prepare(self, *, wide: bool, fp8: bool, measured: bool = False, surveyed: bool = False) -> None:
        """See `Backend`."""
        from streamsoup.kernels import torch_combine, triton_combine  # noqa: F401

        triton_combine.is_available(self._device)  # compiles on a GPU, which is not the run's memory

    def slot(self, tiling: Tiling, *, in_itemsize: int, out_itemsize: int, ingredients: int, staged: bool) -> TorchSlot:
        """See `Backend`."""
        return TorchSlot(
            self._device, tiling, in_itemsize=in_itemsize, out_itemsize=out_itemsize, ingredients=ingredients
        )

    def digest(self, address: int, nbytes: int, itemsize: int, first_block: int) -> int:
        """See `Backend`."""
        import torch

        from streamsoup.kernels import torch_combine
        from streamsoup.maps import bytes_at

        found = torch_combine.digest(torch.from_numpy(bytes_at(address, nbytes).copy()), itemsize, first_block)
        return int(found) % 2**64
