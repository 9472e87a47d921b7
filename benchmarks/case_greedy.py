"""A greedy soup with a trivial score, against two hand-written loops in torch; all keep the candidate in memory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import Run, run_process, settle, summary

from streamsoup.bench.machine import warm
from streamsoup.bench.synthetic import make_checkpoints

HERE = Path(__file__).resolve().parent
# Accepted and rejected in turn: 8 of 16 kept.
ACCEPTED = [i % 2 == 0 for i in range(15)]

_GREEDY = """
import sys, json, time
import safetensors
import torch
import streamsoup
paths, out = sys.argv[2:], sys.argv[1]


class Live(torch.nn.Module):
    # A live module with the checkpoints' tensors: each candidate is streamed into it.
    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors

    def state_dict(self, **_):
        return self.tensors


with safetensors.safe_open(paths[0] + "/model.safetensors", "pt") as first:
    live = Live({name: torch.empty(first.get_slice(name).get_shape(), dtype=torch.bfloat16) for name in first.keys()})
answers = iter(json.loads(sys.stdin.read()))
state = {"best": 1.0}
def score(candidate):
    if len(candidate.members) > 1:
        candidate.load_into(live)
        if next(answers):
            state["best"] += 1.0
            return state["best"]
        return 0.0
    return 1.0
began = time.perf_counter()
result = streamsoup.greedy(paths, out, score=score, order="given", budget_bytes="8GiB")
print(json.dumps({"seconds": time.perf_counter() - began, "kept": len(result.members),
                  "reads": max(result.reads.values()), "bytes_read": result.bytes_read, "peak": result.peak_bytes}))
"""


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Each loop makes every candidate whole, in memory; ours in the tensors of a live module."""
    paths = make_checkpoints("vit-50m" if small else "vit-g-463m", folder / "runs", ingredients=16)
    warm([path / "model.safetensors" for path in paths])
    script = folder / "greedy.py"
    script.write_text(_GREEDY.replace("sys.stdin.read()", repr(json.dumps(ACCEPTED))), encoding="utf-8")
    out = folder / "soup"
    command = [sys.executable, str(script), str(out), *map(str, paths)]
    scores = ",".join("1" if a else "0" for a in ACCEPTED)
    target = folder / "loop.safetensors"
    loop = [sys.executable, str(HERE / "torch_loops.py")]
    rest = [str(target), *map(str, paths), "--scores", scores]
    runs: dict[str, list[Run]] = {"ours": [], "greedy-update": [], "greedy-reload": []}
    for _ in range(max(1, repeats // 2)):
        settle(small)
        runs["ours"].append(run_process(command))
        for path in folder.glob("soup*"):
            shutil.rmtree(path)
        for name in ("greedy-update", "greedy-reload"):
            settle(small)
            runs[name].append(run_process([*loop, name, *rest]))
            target.unlink()
    figures: dict[str, Any] = {"cache": "warm"}
    for name, done in runs.items():
        figures[name] = {
            "process_seconds": summary([run.seconds for run in done]),
            "owned": max(run.owned_bytes for run in done),
            "resident": max(run.resident_bytes for run in done),
        }
    figures["ours"] |= json.loads(runs["ours"][0].output)
    return figures


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    ours = figures["ours"]
    rows = [("ours, whole process", f"{ours['process_seconds']['median']:.1f} s, {_memory(ours)}, kept {ours['kept']}, "
             f"each ingredient read at most {ours['reads']} times")]  # fmt: skip
    for name, label in (
        ("greedy-reload", "reload all kept for each candidate (at least 10)"),
        ("greedy-update", "incremental update in bfloat16"),
    ):
        found = figures[name]
        seconds = found["process_seconds"]["median"]
        ratio = seconds / ours["process_seconds"]["median"]
        rows.append((label, f"{seconds:.1f} s = {ratio:.1f} x ours, {_memory(found)}"))
    return rows


def _memory(found: dict[str, Any]) -> str:
    return f"owned {found['owned'] / 2**30:.2f} GiB (resident {found['resident'] / 2**30:.2f})"
