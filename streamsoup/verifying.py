"""Is a soup what its recipe says? It is made again, all of it or a sample, and compared bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streamsoup.backends import open_backend
from streamsoup.budget import PeakSampler
from streamsoup.checkpoints import Checkpoint, verify_unchanged
from streamsoup.checkpoints.safetensors import open_safetensors
from streamsoup.dtypes import DType
from streamsoup.engine import Engine
from streamsoup.errors import CheckpointError, RecipeError
from streamsoup.execution import Execution, prepare
from streamsoup.made import Made, check_files, check_ingredients, moved, positions_in, read_made
from streamsoup.manifest import content_digests
from streamsoup.merging import copy_all, reduce_all
from streamsoup.outcome import Outcome, Progress
from streamsoup.plan import Plan
from streamsoup.read import choose_mode, open_sources
from streamsoup.sampling import Ranges, choose_sample, others
from streamsoup.sinks import ComparingSink
from streamsoup.soup_plan import plan_opened
from streamsoup.source import PartReader
from streamsoup.units import parse_bytes


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first element of a soup that is not what its recipe makes.

    Attributes
    ----------
    tensor : str
    element : int
        Counted through the whole tensor.
    index : tuple of int
        The same along each axis.
    dtype : DType
    expected, found : bytes
        Its bits, as they lie in the file.
    file : str
    """

    tensor: str
    element: int
    index: tuple[int, ...]
    dtype: DType
    expected: bytes
    found: bytes
    file: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What a soup was compared with, and what came out.

    Attributes
    ----------
    path : Path
    method : str
    ingredients : int
        Checkpoints that it was made of, the base and importances included.
    problems : tuple of str
        What is wrong, a sentence each; of ingredients and files, the numbers were compared only if there is none.
    notes : tuple of str
        What the manifest says besides, and what a sample cannot show.
    tensors, tensors_compared : int
    bytes_total, bytes_compared : int
        Of the soup's tensors.
    tiles : int
    differing : int
        Elements that are not what they should be.
    first : Mismatch or None
    whole : bool
        Whether all was compared, content digests of the ingredients included.
    bytes_read : int
        Of ingredients.
    seconds : float
    projected_peak_bytes, measured_peak_bytes : int
    """

    path: Path
    method: str
    ingredients: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    tensors: int = 0
    tensors_compared: int = 0
    bytes_total: int = 0
    bytes_compared: int = 0
    tiles: int = 0
    differing: int = 0
    first: Mismatch | None = None
    whole: bool = False
    bytes_read: int = 0
    seconds: float = 0.0
    projected_peak_bytes: int = 0
    measured_peak_bytes: int = 0

    @property
    def is_same(self) -> bool:
        """Whether all that was compared is bit for bit what the recipe makes."""
        return not self.problems and not self.differing

    @property
    def share(self) -> float:
        """Share of the soup's bytes that was compared."""
        return self.bytes_compared / self.bytes_total if self.bytes_total else float(self.whole)


def verify(
    path: str | Path,
    *,
    ingredients: Sequence[str | Path] | None = None,
    sample: int | str | None = "64MiB",
    seed: int = 0,
    budget_bytes: int | str | None = None,
    device: str = "cpu",
    device_budget_bytes: int | str | None = None,
    workers: int | None = None,
    read_mode: str = "auto",
    progress: Callable[[Progress], None] | None = None,
    on_compile: Callable[[], None] | None = None,
) -> Verification:
    """Make a soup again from its recipe, all or some of it, and compare it bit for bit with what is there.

    Nothing is written. Any soup with its manifest and recipe will do, however it was made: averaged, merged by a method
    that measures, greedy, learned, converted.

    Parameters
    ----------
    path : path
        The soup: a folder, or a ``.safetensors`` file with what was written beside it.
    ingredients : sequence of path, optional
        Where its checkpoints are now, in the recipe's order: the base, if there is one, the ingredients, their
        importances. By default where they were.
    sample : int or str, optional
        Bytes of the soup to compare, spread over all tensors; None compares all. Where a method measures tensors, whole
        ones are drawn.
    seed : int
        Decides which.
    budget_bytes, device, device_budget_bytes, workers, read_mode, progress, on_compile
        See `Execution`; they change no bit.

    Returns
    -------
    Verification

    Raises
    ------
    StreamsoupError
        If there is no such soup, or its recipe cannot be read. What does not agree is no error: see
        `Verification.problems`.

    Notes
    -----
    Memory: at most `budget_bytes`, for any number and size of ingredients.
    """
    began = time.perf_counter()
    sample_bytes = None if sample is None else parse_bytes(sample)
    if seed < 0:
        raise RecipeError(f"seed {seed}: is negative. Give a whole number from 0 on.")
    execution = Execution(
        budget_bytes=None if budget_bytes is None else parse_bytes(budget_bytes),
        device=device,
        device_budget_bytes=None if device_budget_bytes is None else parse_bytes(device_budget_bytes),
        workers=workers,
        read_mode=read_mode,
        progress=progress,
        on_compile=on_compile,
    )
    made = read_made(path)
    if ingredients is not None:
        made = moved(made, ingredients)
    found = _verify(made, execution, sample_bytes, seed)
    return replace(found, seconds=time.perf_counter() - began)


def _verify(made: Made, execution: Execution, sample_bytes: int | None, seed: int) -> Verification:
    opened, problems = check_ingredients(made)
    checkpoints = opened.checkpoints
    verification = Verification(
        made.destination.path,
        made.recipe.label,
        len(made.recipe.checkpoints),
        tuple(problems),
        tuple(map(str, made.manifest.get("notes", ()))),
    )
    if problems:
        return verification
    try:
        soup = open_safetensors(str(made.destination.path))  # as it is stored: scales are tensors
    except CheckpointError as error:
        return replace(verification, problems=(str(error),))
    mode = _mode([*checkpoints, soup], execution.read_mode, sampled=sample_bytes is not None)
    execution = replace(execution, read_mode=mode)
    plan, execution = plan_opened(
        made.recipe, opened, made.destination, execution, worker_bytes=ComparingSink.WORKER_BYTES
    )
    verification = replace(
        verification,
        tensors=len(plan.table),
        bytes_total=plan.layout.data_bytes,
        projected_peak_bytes=plan.projected_peak_bytes,
    )
    if problems := check_files(made, plan, soup):
        return replace(verification, problems=tuple(problems))
    ranges = choose_sample(plan, plan.layout.data_bytes if sample_bytes is None else sample_bytes, seed)
    sink, outcome, peak_bytes = _compare(plan, soup, ranges, execution)
    for checkpoint in (*checkpoints, soup):
        verify_unchanged(checkpoint)
    whole = sink.compared_bytes == plan.layout.data_bytes
    return replace(
        verification,
        problems=tuple(_changed(made, plan, outcome)) if whole else (),
        tensors_compared=len(ranges) + int((plan.table.elements == 0).sum()),
        bytes_compared=sink.compared_bytes,
        tiles=sink.tiles,
        differing=sink.differing,
        first=_mismatch(plan, soup, sink),
        whole=whole,
        bytes_read=outcome.bytes_read,
        measured_peak_bytes=peak_bytes,
    )


def _mode(checkpoints: Sequence[Checkpoint], asked: str, *, sampled: bool) -> str:
    """Choose how to read; a sample is not worth reading ahead for, which brings whole windows in."""
    mode = choose_mode(checkpoints, asked)
    return "map" if sampled and mode == "ahead" and asked == "auto" else mode


def _compare(plan: Plan, soup: Checkpoint, ranges: Ranges, execution: Execution) -> tuple[ComparingSink, Outcome, int]:
    """Make some elements again; returns what was compared, what was found, and the bytes that were owned at most."""
    mode = execution.read_mode
    backend = open_backend(execution.device, execution.device_budget_bytes)
    prepare(backend, plan, execution.on_compile)
    left_out = others(plan, ranges)
    beside = "plain" if mode == "plain" else "map"
    with (
        PeakSampler() as sampler,
        open_sources(plan.checkpoints, mode) as sources,
        open_sources([soup], beside) as opened,
    ):
        sink = ComparingSink(plan, PartReader(opened[0], buffered=beside == "plain"), positions_in(soup, plan))
        engine = Engine(plan, backend, sources, sink, progress=_of_sample(plan, ranges, execution.progress))
        copy_all(plan, engine, left_out)
        reduce_all(plan, engine, left_out)
        sampler.sample()
    return sink, engine.outcome, sampler.peak_bytes


def _of_sample(
    plan: Plan, ranges: Ranges, progress: Callable[[Progress], None] | None
) -> Callable[[Progress], None] | None:
    """Tell of progress through a sample instead of the whole plan."""
    if progress is None:
        return None
    once = sum(n * int(plan.bytes_each[tensor]) for tensor, pieces in ranges.items() for _, n in pieces)
    again = plan.method.sweeps - 1
    measured = sum(plan.bytes_of(t) for t in ranges if again and plan.is_averaged(t)) * again
    total = once + measured + plan.method.whole_sweeps * sum(map(plan.bytes_of, plan.averaged))
    return lambda now: progress(replace(now, total_bytes=max(total, now.done_bytes)))


def _changed(made: Made, plan: Plan, outcome: Outcome) -> list[str]:
    """Say which ingredients hold other bytes than those that the soup was made of."""
    return [
        f"{checkpoint.path}: its data changed since the soup was made. Put the old file back, or name its new place "
        "(--ingredients)."
        for checkpoint, found, record in zip(
            plan.checkpoints, content_digests(plan, outcome.digests), made.records, strict=True
        )
        if record["content_digest"] not in ("", found)  # a greedy run may not have read all of it
    ]


def _mismatch(plan: Plan, soup: Checkpoint, sink: ComparingSink) -> Mismatch | None:
    if sink.first is None:
        return None
    tensor, left, index = sink.first.tensor, sink.first.element, []
    shape = plan.table.shape(tensor)
    for length in reversed(shape):
        left, along = divmod(left, max(1, length))
        index.append(along)
    name = plan.table.names[tensor]
    shard = soup.shards[int(soup.table.shards[soup.table.names.index(name)])]
    return Mismatch(
        tensor=name,
        element=sink.first.element,
        index=tuple(reversed(index)),
        dtype=plan.out_dtype(tensor),
        expected=sink.first.expected,
        found=sink.first.found,
        file=shard.path,
    )
