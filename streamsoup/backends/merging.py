"""Measuring and merging a tile in decoded pieces, on any device: what both backends' slots do alike."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from streamsoup.backends.protocol import Blend, Combined, Portion
from streamsoup.measurement import Arithmetic, Part, SurveyPart
from streamsoup.methods.protocol import Array, Elementwise, Values
from streamsoup.tiling import BLOCK_ELEMENTS, piece_elements, row_unit


class Pieces(Arithmetic, Protocol):
    """A slot's tile, seen in pieces."""

    def values(self, portion: Portion, blend: Blend, begin: int, count: int) -> Values:
        """Decode elements of the tile."""
        ...

    def nonfinite(self, rows: Array) -> npt.NDArray[np.int64] | None:
        """Count NaN and infinity of each row; None where there is none."""
        ...

    def store(self, result: Array, rows: Array, out: memoryview, blend: Blend) -> int:
        """Round a result into its place, and return how many elements are too large for it."""
        ...

    def digests(self, blend: Blend, portion: Portion) -> npt.NDArray[np.uint64]:
        """Digest the tile's bytes of each ingredient."""
        ...

    def survey(
        self, portion: Portion, blend: Blend, begin: int, count: int, part: SurveyPart
    ) -> npt.NDArray[np.float64]:
        """Do what `streamsoup.kernels.measuring.survey` does; digests and counts are added to those of `part`."""
        ...


# What a survey returns of a stretch stays in the cache.
_SURVEY_ITEMS = 1 << 16
_MOST_SURVEY_BLOCKS = 64


def look(pieces: Pieces, portion: Portion, blend: Blend, part: Part) -> None:
    """Measure a tile."""
    if isinstance(part, SurveyPart):
        _survey(pieces, portion, blend, part)
        return
    step = row_unit(portion.tensor) if part.by_row else piece_elements(len(blend.codes))
    for begin in range(0, portion.elements, step):
        count = min(step, portion.elements - begin)
        part.look(pieces.values(portion, blend, begin, count), pieces, (portion.start + begin) // BLOCK_ELEMENTS)


def _survey(pieces: Pieces, portion: Portion, blend: Blend, part: SurveyPart) -> None:
    checkpoints = len(blend.codes)
    blocks = _SURVEY_ITEMS // (checkpoints * (checkpoints + 1) // 2 + 3)
    step = BLOCK_ELEMENTS * max(1, min(_MOST_SURVEY_BLOCKS, blocks))
    for begin in range(0, portion.elements, step):
        count = min(step, portion.elements - begin)
        found = pieces.survey(portion, blend, begin, count, part)
        part.add(found, (portion.start + begin) // BLOCK_ELEMENTS, count)


def merge(pieces: Pieces, portion: Portion, blend: Blend, rule: Elementwise, out: memoryview) -> Combined:
    """Combine a tile element by element."""
    nonfinite = np.zeros(len(blend.codes), np.int64)
    overflowed = 0
    step = piece_elements(len(blend.codes), portion.tensor.width if rule.by_row else None)
    with np.errstate(all="ignore"):
        for begin in range(0, portion.elements, step):
            count = min(step, portion.elements - begin)
            values = pieces.values(portion, blend, begin, count)
            if (bad := pieces.nonfinite(values.rows)) is not None:
                nonfinite += bad
            place = out[begin * blend.out_itemsize : (begin + count) * blend.out_itemsize]
            overflowed += pieces.store(rule.of(values), values.rows, place, blend)
    return Combined(out, pieces.digests(blend, portion), nonfinite, overflowed)
