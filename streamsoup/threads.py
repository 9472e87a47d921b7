"""Threads that are always waited for, whatever interrupts the waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


def start(name: str, function: Callable[[], None]) -> threading.Event:
    """Run a function in a thread of its own; returns an event that is set when it has ended.

    `Thread.join` will not do: in Python 3.11 and 3.12 one that is interrupted takes the thread for ended.
    """
    ended = threading.Event()

    def run() -> None:
        try:
            function()
        finally:
            ended.set()

    threading.Thread(target=run, name=name, daemon=True).start()
    return ended


def insist(waits: Sequence[Callable[[], object]]) -> None:
    """Do all of these to the end, however often somebody interrupts; the first interrupt is raised afterwards."""
    interrupt: BaseException | None = None
    for wait_for in waits:
        ended = False
        while not ended:
            try:
                wait_for()
                ended = True
            except (KeyboardInterrupt, SystemExit) as error:
                interrupt = interrupt or error
    if interrupt is not None:
        raise interrupt
