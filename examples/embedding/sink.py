"""A place of one's own for finished tiles: here an array that several processes could share.

python examples/embedding/sink.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import streamsoup
from streamsoup.plan import Plan
from streamsoup.write import Sink


class FlatSink(Sink):
    """Lays all tensors out in one array of bytes. Tiles come from several threads, in any order, each once."""

    def __init__(self, plan: Plan) -> None:
        sizes = [int(plan.table.elements[t]) * plan.out_dtype(t).itemsize for t in range(len(plan.table))]
        self.begins = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self.array = np.empty(self.begins[-1], np.uint8)

    def room(self, tensor: int, offset: int, nbytes: int) -> memoryview:
        """Lend memory: the engine's arithmetic writes into it, and nothing is copied."""
        start = self.begins[tensor] + offset
        return self.array[start : start + nbytes].data

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """Take a tile that lies elsewhere: one that was only copied, or comes from a device."""
        self.room(tensor, offset, len(buffer))[:] = buffer


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"run{i}.safetensors" for i in range(3)]
        for path in paths:
            save_file({"weight": torch.randn(300, 400), "bias": torch.randn(300)}, path)
        with streamsoup.open(paths) as soup:
            sink = FlatSink(soup.plan)
            outcome = soup.stream(sink)
            for tensor, key in enumerate(soup):
                part = sink.array[sink.begins[tensor] : sink.begins[tensor + 1]]
                assert part.tobytes() == soup[key].numpy().tobytes()
        print(f"{outcome.bytes_read:,} bytes read, {len(sink.array):,} bytes in one array")


if __name__ == "__main__":
    main()
