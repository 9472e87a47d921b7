"""What a greedy soup will need on disk, known before it begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from streamsoup.pool import Pool

GENERATIONS = 2


def sum_on_disk(pool: Pool, folder: Path | None) -> bool:
    """Whether the running sum goes to a work folder."""
    return folder is not None and not pool.sum_fits


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes that a greedy soup needs on disk.

    Attributes
    ----------
    sums_bytes : int
        Of all generations of the running sum; 0 if it is in memory.
    candidate_bytes, output_bytes : int
        Of one candidate, and of the soup.
    saved_by_float32_bytes : int
        What ``--sums-dtype float32`` would save.
    generations : int
    candidates : int
        That lie on disk at once.
    """

    sums_bytes: int
    candidate_bytes: int
    output_bytes: int
    saved_by_float32_bytes: int

    generations: int = GENERATIONS
    candidates: int = 1

    def to_json(self) -> dict[str, int]:
        """Plain data."""
        return {**asdict(self), "disk_bytes": self.disk_bytes}

    @property
    def disk_bytes(self) -> int:
        """All together."""
        return self.sums_bytes + self.candidates * self.candidate_bytes + self.output_bytes

    @staticmethod
    def of(pool: Pool, *, on_disk: bool, jobs: int = 1) -> Forecast:
        """Forecast for a pool, and so many candidates that are scored at once."""
        sums = GENERATIONS * pool.sum_bytes if on_disk else 0
        elements = pool.sum_bytes // pool.sum_dtype.itemsize
        return Forecast(
            sums_bytes=sums,
            candidate_bytes=pool.layout.file_bytes,
            output_bytes=pool.layout.file_bytes,
            saved_by_float32_bytes=max(0, sums - GENERATIONS * 4 * elements) if on_disk else 0,
            candidates=jobs,
        )
