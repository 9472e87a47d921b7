"""A device of one's own. Here: the CPU's, watched; a real one has slots that copy tiles to some accelerator.

python examples/embedding/backend.py
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import streamsoup
from streamsoup.backends import open_backend


class Watched:
    """A `Backend` that counts tiles: all but what it does otherwise is another's."""

    name = "watched"

    def __init__(self) -> None:
        self._cpu = open_backend("cpu")
        self._lock = threading.Lock()
        self.elements = 0

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._cpu, attribute)

    def slot(self, tiling: Any, needs: Any) -> WatchedSlot:
        return WatchedSlot(self._cpu.slot(tiling, needs), self)

    def count(self, elements: int) -> None:
        with self._lock:  # each worker of the engine has a slot of its own
            self.elements += elements


class WatchedSlot:
    """A `Slot`: buffers of one worker, and what is done in them."""

    def __init__(self, slot: Any, backend: Watched) -> None:
        self._slot = slot
        self._backend = backend

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._slot, attribute)

    def combine(self, sources: Any, blend: Any, first: int, elements: int, *more: Any) -> Any:
        self._backend.count(elements)
        return self._slot.combine(sources, blend, first, elements, *more)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"run{i}.safetensors" for i in range(3)]
        for path in paths:
            save_file({"weight": torch.randn(300, 400), "bias": torch.randn(300)}, path)
        backend = Watched()
        with streamsoup.open(paths, backend=backend) as watched, streamsoup.open(paths) as plain:
            assert all(torch.equal(watched[key], plain[key]) for key in plain)
        print(f"{backend.elements:,} elements combined on a device of our own")
        assert backend.elements == 300 * 400 + 300


if __name__ == "__main__":
    main()
