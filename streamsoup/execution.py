"""How to make a soup, and what it cost: values that change no bit of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from streamsoup.backends.protocol import Backend
from streamsoup.checkpoints import prepare_derived
from streamsoup.devices import check_device_budget
from streamsoup.dtypes import DTYPES
from streamsoup.errors import RecipeError
from streamsoup.outcome import Progress
from streamsoup.plan import Plan

_COMPILE_NOTICE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Execution:
    """How to make a soup; nothing here changes a bit of it.

    Attributes
    ----------
    budget_bytes : int or None
        What the engine may own; None: a quarter of what is free, at most 2 GiB.
    device : str
        ``cpu``, ``cuda``, ``cuda:N``, several as in ``cuda:0,cuda:1``, or ``all`` that CUDA has.
    device_budget_bytes : int or None
        What may be taken of each device's own memory; None: half of what is free there.
    workers : int or None
        Threads; None: the cores, or more where the disk is waited for; on devices four for each.
    read_mode : {"auto", "map", "ahead", "plain", "gds"}
    overwrite : bool
        Replace a soup that stands at the destination.
    keep : bool
        Keep unfinished work after a failure.
    restart : bool
        Throw away unfinished work of an earlier run.
    durable : bool
        Wait until the weights are on the disk. Without it a crash of the program still loses nothing, but one of the
        machine may leave a soup that looks finished and is not.
    distributed : bool
        Share the work with the other ranks of ``torchrun``, all of which call the same.
    progress : callable taking a `Progress`, optional
        An exception from it stops the run. Of several ranks each tells of its share.
    on_compile : callable, optional
        Called once if kernels must be compiled.
    """

    budget_bytes: int | None = None
    device: str = "cpu"
    device_budget_bytes: int | None = None
    workers: int | None = None
    read_mode: str = "auto"
    overwrite: bool = False
    keep: bool = True
    restart: bool = False
    durable: bool = True
    distributed: bool = False
    progress: Callable[[Progress], None] | None = None
    on_compile: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise RecipeError(f"workers: {self.workers} threads, but at least one is needed.")
        check_device_budget(self.device, self.device_budget_bytes)


@dataclass(frozen=True, slots=True)
class SoupResult:
    """What was made, and what it cost.

    Attributes
    ----------
    path : Path
    ingredients, tensors, parameters : int
    bytes_read, bytes_written : int
        Of tensors, in this run.
    seconds : float
        From the first header to the published soup, imports and compilation included.
    engine_seconds : float
        From the first tile until all bytes are durable.
    projected_peak_bytes, measured_peak_bytes : int
        What the engine owned, above the level after imports and compilation.
    metadata_bytes : int
        The plan's own part, projected.
    read_mode, device : str
    workers : int
        Threads that combined.
    stage_seconds : dict of str to float
        Thread-seconds in ``read``, ``reduce``, ``write``; seconds waited for ``sync``.
    limited_by : str
        The stage that took most of the time.
    content_digests : tuple of str
        One for each ingredient.
    notes : tuple of str
        What was let through on request.
    ranks : int
        Processes that made it. Bytes and thread-seconds are of all, peaks those of the one with most.
    """

    path: Path
    ingredients: int
    tensors: int
    parameters: int
    bytes_read: int
    bytes_written: int
    seconds: float
    engine_seconds: float
    projected_peak_bytes: int
    measured_peak_bytes: int
    metadata_bytes: int
    read_mode: str
    device: str
    workers: int
    stage_seconds: dict[str, float]
    limited_by: str
    content_digests: tuple[str, ...]
    notes: tuple[str, ...]
    ranks: int = 1

    @property
    def gb_per_s(self) -> float:
        """Ingredient bytes a second, in 10⁹."""
        return self.bytes_read / 1e9 / self.seconds if self.seconds else 0.0


@contextlib.contextmanager
def compile_notice(on_compile: Callable[[], None] | None) -> Iterator[None]:
    """Call back if the block takes so long that it must be compiling."""
    if on_compile is None:
        yield
        return
    timer = threading.Timer(_COMPILE_NOTICE_SECONDS, on_compile)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def prepare(backend: Backend, plan: Plan, on_compile: Callable[[], None] | None) -> None:
    """Import and compile what a plan needs, before its memory and time are counted."""
    dtypes = {DTYPES[i] for c in plan.checkpoints for i in set(c.table.dtypes.tolist())}
    dtypes |= {DTYPES[i] for i in set(plan.out_dtypes.tolist())}
    wide, fp8 = any(d.is_wide for d in dtypes), any(d.is_fp8 for d in dtypes)
    with compile_notice(on_compile):
        prepare_derived(plan.checkpoints)
        backend.prepare(wide=wide, fp8=fp8, single=plan.accumulate == "float32", measured=not plan.method.fixed)
