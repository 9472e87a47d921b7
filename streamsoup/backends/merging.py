"""Measuring and merging a tile, on any device: what both backends' slots do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streamsoup.backends.protocol import Blend, Combined, Portion
from streamsoup.measurement import Looks, Part, SurveyPart
from streamsoup.methods.protocol import Array, Elementwise
from streamsoup.tiling import BLOCK_ELEMENTS, piece_elements, row_unit


class DeviceTile(Looks, Protocol):
    """A tile of all checkpoints, where a device can reach it.

    Attributes
    ----------
    portion : Portion
    blend : Blend
    longest_look : int or None
        Elements that `sums` and `counts` take at a time; None: any number.
    """

    @property
    def portion(self) -> Portion: ...
    @property
    def blend(self) -> Blend: ...
    @property
    def longest_look(self) -> int | None: ...

    def merge(
        self, begin: int, count: int, function: Callable[[Any], Array], out: memoryview
    ) -> tuple[npt.NDArray[np.int64], int]:
        """Round what a function of `Values` returns into its place.

        Returns how many elements of each checkpoint are not finite, and how many results are too large.
        """
        ...

    def survey(self, begin: int, count: int, part: SurveyPart) -> npt.NDArray[np.float64]:
        """Do what `streamsoup.kernels.measuring.survey` does; digests and counts are added to those of `part`."""
        ...

    def digests(self) -> npt.NDArray[np.uint64]:
        """Digest the tile's bytes of each checkpoint."""
        ...


# What a survey returns of a stretch stays in the cache.
_SURVEY_ITEMS = 1 << 16
_MOST_SURVEY_BLOCKS = 64


def look(tile: DeviceTile, part: Part) -> None:
    """Measure a tile."""
    portion, checkpoints = tile.portion, len(tile.blend.codes)
    first_block = portion.start // BLOCK_ELEMENTS
    if isinstance(part, SurveyPart):
        _survey(tile, part)
        return
    step = piece_elements(checkpoints) if part.is_gram else tile.longest_look or portion.elements
    if part.by_row:
        step = row_unit(portion.tensor)
    for begin in range(0, portion.elements, step):
        count = min(step, portion.elements - begin)
        part.look(tile, begin, count, first_block + begin // BLOCK_ELEMENTS)


def _survey(tile: DeviceTile, part: SurveyPart) -> None:
    portion, checkpoints = tile.portion, len(tile.blend.codes)
    blocks = _SURVEY_ITEMS // (checkpoints * (checkpoints + 1) // 2 + 3)
    step = BLOCK_ELEMENTS * max(1, min(_MOST_SURVEY_BLOCKS, blocks))
    for begin in range(0, portion.elements, step):
        count = min(step, portion.elements - begin)
        found = tile.survey(begin, count, part)
        part.add(found, (portion.start + begin) // BLOCK_ELEMENTS, count)


def merge(tile: DeviceTile, rule: Elementwise, out: memoryview) -> Combined:
    """Combine a tile element by element."""
    portion, itemsize = tile.portion, tile.blend.out_itemsize
    nonfinite = np.zeros(len(tile.blend.codes), np.int64)
    overflowed = 0
    step = piece_elements(len(tile.blend.codes), portion.tensor.width if rule.by_row else None)
    for begin in range(0, portion.elements, step):
        count = min(step, portion.elements - begin)
        place = out[begin * itemsize : (begin + count) * itemsize]
        bad, too_large = tile.merge(begin, count, rule.of, place)
        nonfinite += bad
        overflowed += too_large
    return Combined(out, tile.digests(), nonfinite, overflowed)
