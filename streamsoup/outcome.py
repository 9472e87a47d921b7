"""What a run says of itself: how far it is, and what it found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from streamsoup.journal import TileRecord
from streamsoup.plan import Plan


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes
    ----------
    stage : str
        ``measure``, ``reduce``, ``sync`` or ``publish``.
    done_bytes, total_bytes : int
        Of ingredients; what an interrupted run had done counts too.
    seconds : float
        Since the run began.
    gb_per_s : float
        Ingredient bytes a second, in 10⁹, in this run.
    """

    stage: str
    done_bytes: int
    total_bytes: int
    seconds: float
    gb_per_s: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What a run found.

    Attributes
    ----------
    digests : uint64 array, shape (ingredients, tensors)
        Sums of the digests of all blocks of each tensor.
    nonfinite : dict of (ingredient, tensor) to count
    overflowed : dict of tensor to count
    differs : dict of tensor to set of ingredients
        Copied tensors that are not the same in all ingredients.
    bytes_read, bytes_written : int
    stage_seconds : dict of str to float
        Thread-seconds in ``read``, ``reduce``, ``write``; seconds waited for ``sync``.
    seconds : float
        In which tiles were run.
    """

    digests: npt.NDArray[np.uint64]
    nonfinite: dict[tuple[int, int], int] = field(default_factory=dict)
    overflowed: dict[int, int] = field(default_factory=dict)
    differs: dict[int, set[int]] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(
        default_factory=lambda: {"read": 0.0, "reduce": 0.0, "write": 0.0, "sync": 0.0}
    )

    @staticmethod
    def empty(plan: Plan) -> Outcome:
        """Make the outcome of a run that has not begun."""
        return Outcome(np.zeros((len(plan.checkpoints), len(plan.table)), np.uint64))

    def join(self, other: Outcome) -> Outcome:
        """Take in what another process found of other tiles."""
        self.digests += other.digests
        self.nonfinite = dict(Counter(self.nonfinite) + Counter(other.nonfinite))
        self.overflowed = dict(Counter(self.overflowed) + Counter(other.overflowed))
        for tensor, ingredients in other.differs.items():
            self.differs.setdefault(tensor, set()).update(ingredients)
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written
        for stage, seconds in other.stage_seconds.items():
            self.stage_seconds[stage] += seconds
        self.seconds = max(self.seconds, other.seconds)
        return self

    def add(self, record: TileRecord) -> None:
        """Take in one finished tile."""
        column = self.digests[:, record.tensor]
        np.add(column, record.digests, out=column)
        if record.nonfinite is not None:
            for ingredient in np.flatnonzero(record.nonfinite).tolist():
                key = (ingredient, record.tensor)
                self.nonfinite[key] = self.nonfinite.get(key, 0) + int(record.nonfinite[ingredient])
        if record.overflowed:
            self.overflowed[record.tensor] = self.overflowed.get(record.tensor, 0) + record.overflowed
        if record.differs is not None:
            self.differs.setdefault(record.tensor, set()).update(np.flatnonzero(record.differs).tolist())
