"""What a benchmark found, as values."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Ceilings that others are compared with.
HOST_TO_DEVICE = "host to device"
DEVICE_MEMORY = "device memory"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extremes of several measurements.

    Attributes
    ----------
    median, least, most : float
    samples : tuple of float
        In the order in which they were taken.
    """

    median: float
    least: float
    most: float
    samples: tuple[float, ...]

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Gather measurements; at least one."""
        return Spread(statistics.median(samples), min(samples), max(samples), tuple(samples))


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a part of the machine gives at best.

    Attributes
    ----------
    name : str
    how : str
        In words: what was read or written, and by what convention its bytes are counted.
    gb_per_s : Spread
        10⁹ bytes a second.
    """

    name: str
    how: str
    gb_per_s: Spread

    @staticmethod
    def of(name: str, how: str, nbytes: float, seconds: Sequence[float]) -> Ceiling:
        """Turn times into rates."""
        return Ceiling(name, how, Spread.of([nbytes / s / 1e9 for s in seconds]))


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the engine.

    Attributes
    ----------
    name : str
        ``read``, ``reduce``, ``write`` or ``sync``.
    seconds : float
        Median; of threads side by side, as if one after the other they shared the work.
    gb_per_s : float or None
        What it moved in that time; None where it is no work of its own (mapped files are read while they are reduced).
    ceiling : str or None
        The name of the ceiling that stands over it.
    share : float or None
        Of that ceiling.
    """

    name: str
    seconds: float
    gb_per_s: float | None
    ceiling: str | None
    share: float | None


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """The engine on one set of checkpoints.

    Attributes
    ----------
    what : str
        In words.
    cache : str
        Cold or warm, and how that was made sure.
    read_mode, device : str
    ingredients : int
    input_bytes, output_bytes : int
    seconds : Spread
        Of the engine: reading, reducing, writing and syncing.
    gb_per_s : Spread
        Bytes of ingredients a second.
    dram_gb_per_s : float
        Modelled: each input byte is read once, each output byte written to a buffer and copied to the page cache.
    stages : tuple of Stage
    limited_by : str
    floor_seconds : Spread
        Plain calls and one summing loop that read the same bytes and durably write as many, with the same threads.
    floor_how : str
    peak_bytes, projected_peak_bytes, budget_bytes : int
        Measured, forecast, allowed.
    result_hash : str
        BLAKE2b of the soup's weights.
    """

    what: str
    cache: str
    read_mode: str
    device: str
    ingredients: int
    input_bytes: int
    output_bytes: int
    seconds: Spread
    gb_per_s: Spread
    dram_gb_per_s: float
    stages: tuple[Stage, ...]
    limited_by: str
    floor_seconds: Spread
    floor_how: str
    peak_bytes: int
    projected_peak_bytes: int
    budget_bytes: int
    result_hash: str

    @property
    def limit(self) -> Stage:
        """The stage that limited the run."""
        return next(stage for stage in self.stages if stage.name == self.limited_by)


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """What devices were made use of.

    Attributes
    ----------
    host_to_device_share : float
        Of that ceiling, by the engine's rate of ingredient bytes.
    host_to_device_target : float or None
        What that should be at least; None where the disk is read.
    trial_gb_per_s : Spread
        A greedy trial whose operands are resident: bytes that it reads and writes there.
    trial_share : float
        Of the devices' memory, copied from and to.
    """

    host_to_device_share: float
    host_to_device_target: float | None
    trial_gb_per_s: Spread
    trial_share: float


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Ceilings, and the engine against them.

    Attributes
    ----------
    when : str
        ISO 8601.
    machine : mapping
    load_average_after : float
    ceilings : tuple of Ceiling
    skipped : tuple of str
        Ceilings that could not be measured here, with the reason.
    engine : EngineFigures
    device : DeviceFigures or None
        None on the CPU.
    """

    when: str
    machine: Mapping[str, Any]
    load_average_after: float
    ceilings: tuple[Ceiling, ...]
    skipped: tuple[str, ...]
    engine: EngineFigures
    device: DeviceFigures | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
