"""What the engine owns at most, for any number and size of ingredients, under a budget of 256 MiB."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import run_process

from streamsoup.bench.synthetic import make_checkpoints

BUDGET = 256 * 2**20


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Make soups of few, many and huge ingredients, in every way of reading."""
    cases = [("vit-50m", 2), ("vit-50m", 8), ("vit-50m", 64)]
    cases.append(("small-20mb", 2) if small else ("one-tensor-8gb", 2))
    rows = []
    for preset, count in cases:
        paths = make_checkpoints(preset, folder / "runs", ingredients=count)
        for mode in ("map", "ahead", "plain"):
            out = folder / "soup"
            command = [sys.executable, "-m", "streamsoup", "soup", *map(str, paths), "-o", str(out), "--json"]
            result = run_process([*command, "--budget", str(BUDGET), "--read", mode])
            document = json.loads(result.output)
            rows.append(
                {
                    "preset": preset,
                    "ingredients": count,
                    "read_mode": mode,
                    "measured_peak_bytes": document["measured_peak_bytes"],
                    "projected_peak_bytes": document["projected_peak_bytes"],
                    "process_owned_bytes": result.owned_bytes,
                    "process_resident_bytes": result.resident_bytes,
                }
            )
            shutil.rmtree(out)
        shutil.rmtree(folder / "runs")
    return {"budget_bytes": BUDGET, "rows": rows}


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    return [
        (
            f"{row['ingredients']} x {row['preset']}, {row['read_mode']}",
            f"owned {row['measured_peak_bytes'] / 2**20:.0f} MiB of 256 (projected "
            f"{row['projected_peak_bytes'] / 2**20:.0f}; whole process {row['process_owned_bytes'] / 2**20:.0f})",
        )
        for row in figures["rows"]
    ]
