"""Averages of the latest checkpoints of a run, one after the other: one goes in, one goes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from streamsoup.candidate import Candidate
from streamsoup.errors import RecipeError
from streamsoup.sums import RunningSoup


def sliding_averages(checkpoints: Sequence[str | Path], window: int, **options: Any) -> Iterator[Candidate]:
    """Yield the mean of each `window` checkpoints in a row.

    Parameters
    ----------
    checkpoints : sequence of path
        In the order of their steps.
    window : int
    **options
        See `RunningSoup`.

    Yields
    ------
    Candidate
        Valid until the next one is asked for: load it into a module, or write it.

    Raises
    ------
    StreamsoupError

    Notes
    -----
    Memory: a running sum, whatever the window. Each checkpoint is read when it enters and when it leaves, and
    again where float64 sums would keep a trace of it. Source:
    Kaddour 2022, arXiv 2209.14981 (LAWA).
    """
    paths = [str(path) for path in checkpoints]
    if not 1 <= window <= len(paths):
        raise RecipeError(f"window: {window} of {len(paths)} checkpoints. Choose 1 to {len(paths)}.")
    running = RunningSoup(paths, **options)
    try:
        for number, path in enumerate(paths):
            running.add(path)
            if number >= window:
                running.remove(paths[number - window], 1.0)
            if number >= window - 1:
                yield running.mean()
    finally:
        running.close()
