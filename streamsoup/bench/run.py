"""One benchmark: make checkpoints, measure the ceilings, measure the engine, clean up."""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from streamsoup.bench import ceilings
from streamsoup.bench.machine import drop, last_level_cache_bytes, machine_facts, warm
from streamsoup.bench.presets import PRESETS
from streamsoup.bench.report import HOST_TO_DEVICE, BenchReport, Ceiling, DeviceFigures, EngineFigures, Spread, Stage
from streamsoup.bench.scratch import scratch_folder
from streamsoup.bench.synthetic import checkpoint_bytes, make_checkpoints
from streamsoup.budget import available_cores, default_budget_bytes, free_bytes
from streamsoup.checkpoints import Checkpoint, open_checkpoints
from streamsoup.cook import cook
from streamsoup.devices import check_device_budget, device_names
from streamsoup.errors import RecipeError, StreamsoupError
from streamsoup.execution import Execution, SoupResult
from streamsoup.files import require_space
from streamsoup.kernels.stream import STREAM_BYTES
from streamsoup.recipe import make_recipe
from streamsoup.units import format_bytes

# Files that ceilings are measured on: enough to be steady, few enough to stay in the page cache.
_SAMPLE_BYTES = 2 << 30
_WRITE_BYTES = 512 << 20
_DEVICE_BYTES = 256 << 20
# Of what page-locked memory gives to a device, where ingredients are in the page cache.
_HOST_TO_DEVICE_TARGET = 0.9
_LEAST_REPEATS = 5
_LEAST_ARRAY_BYTES = 64 << 20
_FORMULAS = {"copy": "c = a", "scale": "b = 3 c", "add": "c = a + b", "triad": "a = b + 3 c", "read": "sum of a"}


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure.

    Attributes
    ----------
    preset : str
        Shapes of synthetic checkpoints: a key of `streamsoup.bench.presets.PRESETS`.
    ingredients : int
    dtype : {"bf16", "f16", "f32"}
    paths : tuple of str
        Checkpoints to measure instead; they are only read.
    cold : bool
        Drop the checkpoints from the page cache before each run of the engine.
    folder : str or None
        Where files are made; None: the system's place for temporary files.
    repeats : int
        At least 5.
    budget_bytes, device, device_budget_bytes, workers
        See `Execution`.
    """

    preset: str = "vit-b32"
    ingredients: int = 8
    dtype: str = "bf16"
    paths: tuple[str, ...] = ()
    cold: bool = False
    folder: str | None = None
    repeats: int = _LEAST_REPEATS
    budget_bytes: int | None = None
    device: str = "cpu"
    device_budget_bytes: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.repeats < _LEAST_REPEATS:
            raise RecipeError(f"repeats: {self.repeats}, but medians are taken of at least {_LEAST_REPEATS}.")
        if self.ingredients < 1:
            raise RecipeError(f"ingredients: {self.ingredients}, but there must be one at least.")
        if not self.paths:
            checkpoint_bytes(self.preset, self.dtype)  # is there such a thing?
        device_names(self.device)
        check_device_budget(self.device, self.device_budget_bytes)


def run_bench(options: BenchOptions, *, step: Callable[[str], None] = lambda text: None) -> BenchReport:
    """Measure the ceilings of this machine, and the engine against them.

    Parameters
    ----------
    options : BenchOptions
    step : callable taking str, optional
        Called when something new begins, with words for it.

    Raises
    ------
    StreamsoupError
        If there is no room, or the checkpoints cannot be made warm or cold.

    Notes
    -----
    All that is made is made in one temporary folder, and removed at the end. Memory: three arrays of four times the
    last-level cache, and the budget.
    """
    when, machine = datetime.now(UTC).isoformat(timespec="seconds"), machine_facts()
    with scratch_folder(options.folder) as folder:
        checkpoints, what = _checkpoints(options, folder, step)
        bench = _Bench(options, folder, checkpoints, what, step)
        step("the engine, once: compiling, if need be")
        # Its memory is measured now: later it would find room that the arrays of the ceilings left in the process.
        peak = bench.soup().measured_peak_bytes
        found, skipped = bench.ceilings()
        best = {ceiling.name: ceiling.gb_per_s.median for ceiling in found}
        engine = bench.engine(best, peak)
        device = bench.device(best, engine)
    return BenchReport(when, machine, os.getloadavg()[0], tuple(found), tuple(skipped), engine, device)


def _checkpoints(options: BenchOptions, folder: Path, step: Callable[[str], None]) -> tuple[list[Checkpoint], str]:
    if options.paths:
        checkpoints = open_checkpoints(options.paths)
        require_space(folder, checkpoints[0].table.nbytes.sum().item() + 2 * _WRITE_BYTES)
        return checkpoints, f"{len(checkpoints)} checkpoints of yours"
    each = checkpoint_bytes(options.preset, options.dtype)
    require_space(folder, each * (options.ingredients + 1) + 2 * _WRITE_BYTES)
    total = f"{options.ingredients} x {options.preset} {options.dtype}"
    step(f"making {total}, {format_bytes(each * options.ingredients)}")
    paths = make_checkpoints(
        options.preset, folder / "runs", ingredients=options.ingredients, dtype=options.dtype,
        made=lambda number: step(f"making {total}: {number} of {options.ingredients}"),
    )  # fmt: skip
    return open_checkpoints([str(path) for path in paths]), total


@dataclass(frozen=True, slots=True)
class _Bench:
    options: BenchOptions
    folder: Path
    checkpoints: Sequence[Checkpoint]
    what: str
    step: Callable[[str], None]

    @property
    def threads(self) -> int:
        return self.options.workers or available_cores()

    @property
    def files(self) -> list[Path]:
        return [Path(shard.path) for checkpoint in self.checkpoints for shard in checkpoint.shards]

    def ceilings(self) -> tuple[list[Ceiling], list[str]]:
        """Measure what the machine gives at best."""
        found = self._memory()
        sample, nbytes = self._sample()
        self.step("page cache: mapped and plain reads")
        warm(sample)
        size = f"{format_bytes(nbytes)} of the checkpoints"
        repeats, threads = range(self.options.repeats), self.threads
        ceilings.mapped_read_seconds(sample, threads)
        seconds = [ceilings.mapped_read_seconds(sample, threads) for _ in repeats]
        found.append(Ceiling.of("mapped read, warm", f"sum of {size}, {threads} threads", nbytes, seconds))
        seconds = [ceilings.plain_read_seconds(sample, threads) for _ in repeats]
        found.append(Ceiling.of("preadv, warm", f"{size} into 2 MiB buffers, {threads} threads", nbytes, seconds))
        self.step("disk: writes")
        writes = [ceilings.write_seconds(_WRITE_BYTES, threads, self.folder) for _ in repeats]
        how = f"{format_bytes(_WRITE_BYTES)} into a reserved file, {threads} threads"
        found.append(Ceiling.of("page cache write", f"{how}, not synced", _WRITE_BYTES, [w for w, _ in writes]))
        found.append(Ceiling.of("disk write", f"{how}, synced", _WRITE_BYTES, [s for _, s in writes]))
        cold, skipped = self._cold_reads(sample, nbytes)
        found += cold
        if self.options.device != "cpu":
            from streamsoup.bench.device import measure_copies

            self.step("copies to and from devices")
            found += measure_copies(self.options.device, _DEVICE_BYTES, self.options.repeats)
        return found, skipped

    def device(self, best: dict[str, float], engine: EngineFigures) -> DeviceFigures | None:
        """Compare the engine with the way to the devices, and a greedy trial with their memory."""
        if self.options.device == "cpu":
            return None
        from streamsoup.bench.device import measure_trials

        self.step("a greedy trial whose operands are on the device")
        trial, share = measure_trials(self.options.device, _DEVICE_BYTES, self.options.repeats, best)
        target = None if self.options.cold else _HOST_TO_DEVICE_TARGET
        return DeviceFigures(engine.gb_per_s.median / best[HOST_TO_DEVICE], target, trial, share)

    def _memory(self) -> list[Ceiling]:
        nbytes = min(max(4 * last_level_cache_bytes(), _LEAST_ARRAY_BYTES), free_bytes() // 8) // 8 * 8
        self.step(f"memory: STREAM, three arrays of {nbytes >> 20} MiB")
        taken = ceilings.stream_seconds(nbytes, self.threads, self.options.repeats)
        return [
            Ceiling.of(
                f"memory {name}",
                f"{_FORMULAS[name]}, float64, {STREAM_BYTES[name]} bytes an element, {self.threads} threads",
                nbytes / 8 * STREAM_BYTES[name],
                seconds,
            )
            for name, seconds in taken.items()
        ]

    def _sample(self) -> tuple[list[Path], int]:
        """Choose the first files, as many as are enough."""
        most, chosen, nbytes = min(_SAMPLE_BYTES, free_bytes() // 4), list[Path](), 0
        for path in self.files:
            if chosen and nbytes + path.stat().st_size > most:
                break
            chosen.append(path)
            nbytes += path.stat().st_size
        return chosen, nbytes

    def _cold_reads(self, sample: list[Path], nbytes: int) -> tuple[list[Ceiling], list[str]]:
        found, skipped = list[Ceiling](), list[str]()
        for mode in ceilings.READ_MODES:
            name = f"disk read, {mode}"
            self.step(f"disk: cold reads, {mode}")
            seconds = []
            try:
                for _ in range(self.options.repeats):
                    drop(sample)
                    seconds.append(ceilings.plain_read_seconds(sample, ceilings.DISK_THREADS, mode=mode))
            except (OSError, StreamsoupError) as error:
                skipped.append(f"{name}: {error}")
                continue
            how = f"{format_bytes(nbytes)} dropped from the cache, {ceilings.DISK_THREADS} threads"
            found.append(Ceiling.of(name, how, nbytes, seconds))
        return found, skipped

    def engine(self, best: dict[str, float], peak_bytes: int) -> EngineFigures:
        """Measure the engine and its floor, turn by turn; its peak was measured before."""
        options = self.options
        disk = {name: rate for name, rate in best.items() if name.startswith("disk read")}
        if options.cold and not disk:
            raise StreamsoupError("The files cannot be dropped from the page cache here. Measure them warm.")
        fastest = max(disk, key=lambda name: disk[name]) if disk else ""
        words = "cold" if options.cold else "warm"
        results, floors, share = list[SoupResult](), list[float](), 0.0
        for number in range(options.repeats):
            self.step(f"the engine, {words}: {number + 1} of {options.repeats}")
            share = drop(self.files) if options.cold else warm(self.files)
            results.append(self.soup())
            digest = self._hash()
            drop(self.files) if options.cold else warm(self.files)
            floors.append(self._floor(results[0].bytes_written, fastest.removeprefix("disk read, ")))
        first = results[0]
        seconds = Spread.of([r.engine_seconds for r in results])
        stages = _stages(results, best, fastest)
        waited = {stage.name: stage.seconds for stage in stages}
        how = "dropped before each run" if options.cold else "read before each run"
        return EngineFigures(
            what=self.what,
            cache=f"{words}: {how}; {share:.0%} of the checkpoints was in the page cache",
            read_mode=first.read_mode,
            device=first.device,
            ingredients=len(self.checkpoints),
            input_bytes=first.bytes_read,
            output_bytes=first.bytes_written,
            seconds=seconds,
            gb_per_s=Spread.of([first.bytes_read / r.engine_seconds / 1e9 for r in results]),
            dram_gb_per_s=(first.bytes_read + 3 * first.bytes_written) / seconds.median / 1e9,
            stages=stages,
            limited_by=max(waited, key=lambda name: waited[name]),
            floor_seconds=Spread.of(floors),
            floor_how=(
                f"plain reads ({fastest.removeprefix('disk read, ')}) beside a synced write"
                if options.cold
                else "mapped read, then a synced write"
            ),
            peak_bytes=max(peak_bytes, *(r.measured_peak_bytes for r in results)),
            projected_peak_bytes=first.projected_peak_bytes,
            budget_bytes=options.budget_bytes or default_budget_bytes(),
            result_hash=digest,
        )

    def soup(self) -> SoupResult:
        """Make the soup once."""
        out = self.folder / "soup"
        shutil.rmtree(out, ignore_errors=True)
        execution = Execution(
            budget_bytes=self.options.budget_bytes,
            device=self.options.device,
            device_budget_bytes=self.options.device_budget_bytes,
            workers=self.options.workers,
        )
        return cook(make_recipe([c.path for c in self.checkpoints]), out, execution)

    def _hash(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted((self.folder / "soup").glob("*.safetensors")):
            with path.open("rb") as file:
                while piece := file.read(16 << 20):
                    digest.update(piece)
        return digest.hexdigest()

    def _floor(self, output_bytes: int, mode: str) -> float:
        if not self.options.cold:
            read = ceilings.mapped_read_seconds(self.files, self.threads)
            return read + ceilings.write_seconds(output_bytes, self.threads, self.folder)[1]
        return ceilings.plain_read_seconds(
            self.files,
            ceilings.DISK_THREADS,
            mode=mode,
            beside=lambda: ceilings.write_seconds(output_bytes, 1, self.folder),
        )


def _stages(results: Sequence[SoupResult], best: dict[str, float], fastest: str) -> tuple[Stage, ...]:
    """Compare each stage with the ceiling that stands over it."""
    first = results[0]
    mapped, locked = first.read_mode == "map", HOST_TO_DEVICE in best
    over = {
        # A device's buffers are filled from the maps; without one, nothing is read but by those who reduce.
        "read": ("mapped read, warm" if locked else None) if mapped else fastest or "preadv, warm",
        "reduce": HOST_TO_DEVICE if locked else "mapped read, warm" if mapped else "memory read",
        "write": "page cache write",
        "sync": "disk write",
    }
    moved = {name: first.bytes_read if name in ("read", "reduce") else first.bytes_written for name in over}
    stages = []
    for name, ceiling in over.items():
        threads = 1 if name == "sync" else first.workers
        seconds = statistics.median(r.stage_seconds[name] for r in results) / threads
        # Syncing goes on all the time: what is waited for at the end is the rest of it.
        busy = statistics.median(r.engine_seconds for r in results) if name == "sync" else seconds
        rate = moved[name] / busy / 1e9 if ceiling is not None and busy > 0 and seconds > 0 else None
        reached = rate / best[ceiling] if rate is not None and ceiling is not None and ceiling in best else None
        stages.append(Stage(name, seconds, rate, ceiling, reached))
    return tuple(stages)


__all__ = ["PRESETS", "BenchOptions", "run_bench"]
