"""Time and memory against the number of ingredients, and a picture of both."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import run_process, summary

from streamsoup.bench.machine import warm
from streamsoup.bench.synthetic import make_checkpoints

HERE = Path(__file__).resolve().parent
COUNTS = (2, 4, 8, 16, 32, 64)
PICTURE = HERE.parent / "docs" / "scaling.png"


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Ours and the hand-written loop, for more and more ingredients."""
    preset, counts = ("small-20mb", COUNTS[:2]) if small else ("vit-b32", COUNTS)
    paths = make_checkpoints(preset, folder / "runs", ingredients=max(counts))
    warm([path / "model.safetensors" for path in paths])
    soup, target = folder / "soup", folder / "loop.safetensors"
    rows = []
    for count in counts:
        command = [sys.executable, "-m", "streamsoup", "soup", *map(str, paths[:count]), "-o", str(soup), "--json"]
        loop = [sys.executable, str(HERE / "torch_loops.py"), "uniform", str(target), *map(str, paths[:count])]
        ours, loops = [], []
        for _ in range(max(1, repeats // 2)):
            ours.append(run_process(command))
            shutil.rmtree(soup)
            loops.append(run_process(loop))
            target.unlink()
        rows.append(
            {
                "ingredients": count,
                "ours_seconds": summary([run.seconds for run in ours]),
                "ours_owned_bytes": max(run.owned_bytes for run in ours),
                "ours_peak_bytes": max(json.loads(run.output)["measured_peak_bytes"] for run in ours),
                "loop_seconds": summary([run.seconds for run in loops]),
                "loop_owned_bytes": max(run.owned_bytes for run in loops),
            }
        )
    figures = {"preset": preset, "each_bytes": (paths[0] / "model.safetensors").stat().st_size, "rows": rows}
    if not small:
        draw(figures, PICTURE)
    return figures


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw seconds and memory against the number of ingredients."""
    from matplotlib.figure import Figure

    rows = figures["rows"]
    counts = [row["ingredients"] for row in rows]
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, ours, loop, label in (
        (left, [r["ours_seconds"]["median"] for r in rows], [r["loop_seconds"]["median"] for r in rows], "seconds"),
        (right, [r["ours_owned_bytes"] / 2**20 for r in rows], [r["loop_owned_bytes"] / 2**20 for r in rows],
         "peak memory owned, MiB"),
    ):  # fmt: skip
        axes.plot(counts, loop, marker="o", color="#8a8f98", label="hand-written torch loop")
        axes.plot(counts, ours, marker="o", color="#2b6cb0", label="streamsoup, whole process")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"ingredients of {figures['each_bytes'] / 1e6:.0f} MB")
        axes.set_title(label, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=150)


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    return [
        (
            f"N = {row['ingredients']}: ours / loop",
            f"{row['ours_seconds']['median']:.2f} s, {row['ours_owned_bytes'] / 2**20:.0f} MiB / "
            f"{row['loop_seconds']['median']:.2f} s, {row['loop_owned_bytes'] / 2**20:.0f} MiB",
        )
        for row in figures["rows"]
    ]
