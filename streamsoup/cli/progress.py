"""Progress: a bar on a terminal, a quiet line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from streamsoup.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from streamsoup.outcome import Progress

_LINE_SECONDS = 10.0


class SilentProgress:
    """Shows nothing."""

    def __call__(self, progress: Progress) -> None:
        """Take a step."""

    def compiling(self) -> None:
        """Kernels are being compiled."""

    def __enter__(self) -> SilentProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class LineProgress(SilentProgress):
    """Prints a line every ten seconds on standard error."""

    def __init__(self, verb: str = "souping") -> None:
        self._verb = verb
        self._next = time.monotonic() + _LINE_SECONDS

    def __call__(self, progress: Progress) -> None:
        """See `SilentProgress`."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_SECONDS
            print(_sentence(progress, self._verb), file=sys.stderr, flush=True)

    def compiling(self) -> None:
        """See `SilentProgress`."""
        print("Compiling kernels (only this once) ...", file=sys.stderr, flush=True)


class BarProgress(SilentProgress):
    """Draws a bar on the terminal with rich."""

    def __init__(self, verb: str = "souping") -> None:
        self._verb = verb
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, progress: Progress) -> None:
        """See `SilentProgress`."""
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %  {task.fields[text]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=progress.total_bytes, text="")
            self._bar.start()
        self._bar.update(
            self._task, completed=progress.done_bytes, description=_label(progress, self._verb), text=_numbers(progress)
        )

    def compiling(self) -> None:
        """See `SilentProgress`."""
        print("Compiling kernels (only this once) ...", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def make_progress(*, quiet: bool, transient: bool = False, verb: str = "souping") -> SilentProgress:
    """Choose what fits standard error. Many short runs (`transient`) show no progress of their own.

    `verb`: what is being done, once all is measured.
    """
    if quiet or transient:
        return SilentProgress()
    return BarProgress(verb) if sys.stderr.isatty() else LineProgress(verb)


def _label(progress: Progress, verb: str) -> str:
    return {"measure": "measuring", "reduce": verb, "sync": "syncing"}.get(progress.stage, progress.stage)


def _numbers(progress: Progress) -> str:
    done = f"{format_bytes(progress.done_bytes)} of {format_bytes(progress.total_bytes)}"
    rate = progress.gb_per_s
    left = (progress.total_bytes - progress.done_bytes) / 1e9 / rate if rate else 0.0
    return f"{done}  {rate:.2f} GB/s  {format_seconds(left)} left"


def _sentence(progress: Progress, verb: str) -> str:
    share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
    return f"{_label(progress, verb)}: {share:.0%}, {_numbers(progress)}"
