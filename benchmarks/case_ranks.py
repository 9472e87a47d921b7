"""The same soup by one process with one thread and with two, and by ranks of torchrun with one thread each."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import PAUSE_SECONDS, run_process, settle, summary

from streamsoup.bench.machine import warm
from streamsoup.bench.synthetic import make_checkpoints
from streamsoup.budget import available_cores


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Interleave all ways; a fixed method, and one that must measure large tensors together."""
    paths = make_checkpoints("small-20mb" if small else "vit-g-463m", folder / "runs", ingredients=8)
    warm([path / "model.safetensors" for path in paths])
    runs, soup = [str(path) for path in paths], folder / "soup"
    methods = {"uniform": runs, "karcher": [*runs, "--method", "karcher"]}
    ways = {f"{n} thread(s)": (1, n) for n in _counts()} | {f"{n} ranks": (n, 1) for n in _counts() if n > 1}
    rows = []
    for method, arguments in methods.items():
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        processes: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(repeats + 1):
            for way, (ranks, threads) in ways.items():
                done = run_process(_command(ranks, ["soup", *arguments, "-o", str(soup), "--threads", str(threads)]))
                shutil.rmtree(soup)
                settle(small)
                if number:  # the first round compiles
                    seconds[way].append(json.loads(done.output.splitlines()[-1])["engine_seconds"])
                    processes[way].append(done.seconds)
        rows += [
            {
                "method": method,
                "way": way,
                "engine_seconds": summary(seconds[way]),
                "process_seconds": summary(processes[way]),
            }
            for way in ways
        ]
    return {"cores": available_cores(), "cache": "warm", "pause_seconds": PAUSE_SECONDS, "rows": rows}


def _counts() -> list[int]:
    return [n for n in (1, 2, 4, 8) if n <= available_cores()]


def _command(ranks: int, arguments: list[str]) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, "-m", "streamsoup", *arguments, "--json"]


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    rows = figures["rows"]
    alone = {row["method"]: row["engine_seconds"]["median"] for row in rows if row["way"] == "1 thread(s)"}
    return [
        (
            f"{row['method']}, {row['way']}",
            f"engine {row['engine_seconds']['median']:.2f} s "
            f"({alone[row['method']] / row['engine_seconds']['median']:.2f} times one thread), "
            f"whole {row['process_seconds']['median']:.2f} s",
        )
        for row in rows
    ]
