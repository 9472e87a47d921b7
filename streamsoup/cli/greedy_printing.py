"""What ``streamsoup greedy`` prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from streamsoup.cli.printing import naming_json, naming_rows, on_device
from streamsoup.units import format_binary, format_bytes, format_seconds

if TYPE_CHECKING:
    from streamsoup.greedy_job import GreedyJob, GreedyResult, TrialRecord


_PLACES = {"device": "on the device", "host": "in memory"}


class Table:
    """Prints one line a decision."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._begun = False

    def alone(self, path: str, score: float) -> None:
        """Say that an ingredient was scored alone: it may take long until the first decision."""
        if not self._quiet:
            print(f"scored {_name(path)} alone: {score:.6g}", file=sys.stderr, flush=True)

    def __call__(self, record: TrialRecord) -> None:
        """Print a decision."""
        if self._quiet:
            return
        if not self._begun:
            self._begun = True
            print(f"{'ingredient':<28} {'own score':>11} {'soup':>11}   {'':<9} {'kept':>5} {'seconds':>8} {'read':>9}")
        own = "-" if record.own_score is None else f"{record.own_score:.6g}"
        word = ("kept" if record.accepted else "rejected") if record.change >= 0 else None
        word = word or ("dropped" if record.accepted else "needed")
        tie = "=" if record.tie else " "
        print(
            f"{_name(record.path):<28} {own:>11} {record.score:>11.6g} {tie} {word:<9} {record.size:>5} "
            f"{record.seconds:>8.2f} {format_bytes(record.bytes_read):>9}",
            flush=True,
        )


def _name(path: str) -> str:
    from streamsoup.checkpoints import split_path

    parts = [Path(part) for part in split_path(path)]
    name = "+".join(part.name for part in parts) if len(parts) > 1 else "/".join(parts[0].parts[-2:])
    return name if len(name) <= 28 else f"...{name[-25:]}"


def print_forecast(job: GreedyJob, folder: Path, *, as_json: bool) -> None:
    """Print what a job will need."""
    from streamsoup.forecast import Forecast, sum_on_disk
    from streamsoup.pool import Pool

    pool = Pool(job.ingredients, job.pool)
    on_disk = sum_on_disk(pool, folder)
    forecast = Forecast.of(pool, on_disk=on_disk, jobs=job.jobs)
    each = max(int(c.table.nbytes.sum()) for c in pool.checkpoints.values())
    if as_json:
        more = {"sum_bytes": pool.sum_bytes, "sum_on_disk": on_disk, "devices": [s.to_json() for s in pool.shares]}
        print(json.dumps({**forecast.to_json(), **more, **naming_json(pool.touched, pool.left_out)}))
        return
    print(f"greedy soup of {len(job.ingredients)} checkpoints of up to {format_bytes(each)}")
    where = f"{folder}/sums, {forecast.generations} generations" if on_disk else _PLACES[pool.sum_place]
    candidates = "one candidate" if job.jobs == 1 else f"{job.jobs} candidates"
    candidates += f" {format_bytes(forecast.candidates * forecast.candidate_bytes)}"
    rows = [
        ("running sum", f"{format_bytes(pool.sum_bytes)} ({pool.sum_dtype.name.lower()}), {where}"),
        ("a trial", f"reads {format_bytes(each + pool.sum_bytes)} (one checkpoint and the sum) and writes "
         f"{format_bytes(forecast.candidate_bytes)}"),
        ("an accepted", f"reads {format_bytes(each + pool.sum_bytes)} and writes {format_bytes(pool.sum_bytes)}"),
        ("disk needed", f"{format_bytes(forecast.disk_bytes)}: sums {format_bytes(forecast.sums_bytes)}, {candidates}, "
         f"the soup {format_bytes(forecast.output_bytes)}"),
        ("budget", f"{format_binary(pool.budget_bytes)}"),
        *[("device", on_device(share)) for share in pool.shares],
    ]  # fmt: skip
    if forecast.saved_by_float32_bytes:
        rows.append(("to save disk", f"--sums-dtype float32 saves {format_bytes(forecast.saved_by_float32_bytes)}"))
    rows += [("note", note) for note in pool.notes]
    for label, text in [*naming_rows(pool.touched, pool.left_out), *rows]:
        print(f"  {label:<12} {text}")


def print_result(result: GreedyResult) -> None:
    """Print what came of it."""
    kept = ", ".join(f"{_name(m.path)}" + (f" x{m.weight:g}" if m.weight != 1 else "") for m in result.members)
    print(f"\nkept {len(result.members)} of {result.ingredients}: {kept}")
    if result.is_best_single:
        print("No candidate was good enough: the soup is the best single ingredient. They may lie too far apart.")
    for group in result.ties:
        print(f"equal scores of their own, taken in the given order: {', '.join(map(_name, group))}")
    print(
        f"score {result.score:.6g}; {result.evaluations} evaluations, read {format_bytes(result.bytes_read)}, wrote "
        f"{format_bytes(result.bytes_written)} in {format_seconds(result.seconds)}, peak memory "
        f"{format_binary(result.peak_bytes)}"
    )
    for note in result.notes:
        print(f"note: {note}")
    if (once := result.at_once) is not None:
        saved = f"{format_seconds(once.saved_seconds)} of waiting, {once.saved_evaluations:.1f} evaluations' worth"
        print(
            f"{once.beside} evaluations ran beside others, {once.wasted} were wasted; this saved "
            f"{saved if once.saved_seconds > 0 else 'no waiting'}"
        )
    if result.rebuilt > 1:
        print(f"the running sum was made anew {result.rebuilt} times, so that no bit depends on what was tried")
    if result.path is not None:
        print(f"soup: {result.path}")
