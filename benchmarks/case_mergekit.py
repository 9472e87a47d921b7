"""The same recipes through mergekit and through streamsoup: seconds, memory, and how far the results differ."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from environments import pinned_version, python_of
from measure import Run, figures_of, run_process, settle
from rounding import decode, load_bits

from streamsoup.bench.machine import warm
from streamsoup.bench.synthetic import make_checkpoints

HERE = Path(__file__).resolve().parent
CHECKPOINTS, PRESET, SMALL_PRESET = 8, "vit-g-463m", "small-20mb"
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
_WEIGHT = {"weight": 0.3}
_THIN = {"weight": 0.3, "density": 0.5}
# Models beside the base (None: all), whether there is a base, parameters.
METHODS: dict[str, tuple[int | None, bool, dict[str, Any]]] = {
    "linear": (None, False, _WEIGHT),
    "slerp": (1, True, {"t": 0.3}),
    "nuslerp": (2, True, _WEIGHT),
    "multislerp": (None, True, _WEIGHT),
    "karcher": (None, False, {}),
    "task_arithmetic": (None, True, _WEIGHT),
    "ties": (None, True, _THIN),
    "dare_linear": (None, True, _THIN),
    "dare_ties": (None, True, _THIN),
    "della": (None, True, _THIN),
    "della_linear": (None, True, _THIN),
    "breadcrumbs": (None, True, _THIN),
    "breadcrumbs_ties": (None, True, _THIN),
    "sce": (None, True, {"select_topk": 0.5}),
    "model_stock": (None, True, {}),
    "passthrough": (1, False, {"scale": 0.5}),
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def run(folder: Path, *, repeats: int, small: bool, environments: Path, only: str = "") -> dict[str, Any]:
    """Measure every method (or `only` some, such as ``ties,slerp``) on the same bfloat16 files."""
    methods = [name for name in METHODS if not only or name in only.split(",")]
    if unknown := set(filter(None, only.split(","))) - set(METHODS):
        raise SystemExit(f"--only: {sorted(unknown)[0]!r} is not one of {', '.join(METHODS)}.")
    python = python_of(environments, "mergekit")
    paths = make_checkpoints(SMALL_PRESET if small else PRESET, folder / "runs", ingredients=CHECKPOINTS)
    files = [path / "model.safetensors" for path in paths]
    warm(files)
    cases = [_measure(folder, files, name, repeats, python) for name in methods]
    return {
        "cache": "warm: every file was read once before",
        "versions": {"mergekit": pinned_version("mergekit")},
        "preset": SMALL_PRESET if small else PRESET,
        "dtypes": "bfloat16 files and result, float32 arithmetic in mergekit",
        "checkpoint_bytes": files[0].stat().st_size,
        "cases": cases,
    }


def _measure(folder: Path, files: list[Path], method: str, repeats: int, python: str) -> dict[str, Any]:
    config, out = folder / "config.yml", folder / "out"
    document = _recipe(files, method)
    config.write_text(json.dumps(document), encoding="utf-8")
    commands = {
        "ours": [sys.executable, "-m", "streamsoup", "mergekit", str(config), str(out), "--json", "--no-sync"],
        "mergekit": [python, str(HERE / "peers.py"), "mergekit-config", str(out), str(config)],
    }
    # The first round makes what is compared. It also compiles and loads libraries, so it is timed only if it is the
    # only one: some methods take mergekit many minutes.
    kept: dict[str, Path] = {}
    done: dict[str, list[Run]] = {tool: [] for tool in commands}
    if repeats == 1:
        run_process(commands["ours"], environment=_QUIET)
        shutil.rmtree(out)
    for tool, command in commands.items():
        first = run_process(command, environment=_QUIET)
        done[tool] += [first] * (repeats == 1)
        kept[tool] = folder / f"kept-{tool}"
        out.rename(kept[tool])
    differences = _compare(kept["ours"], kept["mergekit"], files[0].parent)
    for tool in kept:
        shutil.rmtree(kept[tool])
    for _ in range(repeats if repeats > 1 else 0):
        for tool, command in commands.items():
            settle()
            done[tool].append(run_process(command, environment=_QUIET))
            shutil.rmtree(out)
    return {
        "method": method,
        "checkpoints": len(document["models"]) + ("base_model" in document),
        "random": method in RANDOM,
        **differences,
        "tools": {tool: figures_of(runs) for tool, runs in done.items()},
    }


def _recipe(files: list[Path], method: str) -> dict[str, Any]:
    count, has_base, parameters = METHODS[method]
    models = files[has_base:] if count is None else files[has_base : has_base + count]
    document: dict[str, Any] = {"merge_method": method, "models": [{"model": str(file)} for file in models]}
    if has_base:
        document["base_model"] = str(files[0])
    return {**document, "parameters": parameters, "dtype": "float32", "out_dtype": "bfloat16"}


def _compare(ours: Path, theirs: Path, first: Path) -> dict[str, Any]:
    """Largest difference as a part of a tensor's largest number, share of equal elements, shares that moved."""
    mine, other, start = (load_bits(folder, "bf16") for folder in (ours, theirs, first))
    if mine.keys() != other.keys():
        raise SystemExit(f"{next(iter(mine.keys() ^ other.keys()))}: a tensor of one output, but not of the other.")
    worst, equal, moved, total = 0.0, 0, [0, 0], 0
    for name, bits in mine.items():
        a, b = (decode(x, "bf16") for x in (bits, other[name]))
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300)))
        equal += int(np.count_nonzero(a == b))
        for i, x in enumerate((bits, other[name])):
            moved[i] += int(np.count_nonzero(x != start[name]))
        total += bits.size
    return {
        "largest_difference": worst,
        "share_equal": equal / total,
        "share_moved": {"ours": moved[0] / total, "mergekit": moved[1] / total},
    }


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read: each method, ours and mergekit's."""
    gb = figures["checkpoint_bytes"] / 1e9
    rows = [
        ("mergekit", f"{figures['versions']['mergekit']}; {figures['preset']}, {gb:.2f} GB a checkpoint, warm"),
        ("dtypes", figures["dtypes"]),
        ("seconds", "whole process, with start and imports; neither waits for the disk"),
        (
            "equal",
            "these checkpoints differ by whole ulps, so many differences have one size: of those ties and sce keep all",
        ),
    ]
    for case in figures["cases"]:
        ours, theirs = (case["tools"][tool] for tool in ("ours", "mergekit"))
        times = theirs["process_seconds"]["median"] / ours["process_seconds"]["median"]
        label = f"{case['method']}, {case['checkpoints']}"
        rows.append((f"**{label}**", f"{times:.1f} x faster; {_agreement(case)}"))
        rows += [(f"{label}: {tool}", _rest(case["tools"][tool])) for tool in ("ours", "mergekit")]
    return rows


def markdown(figures: dict[str, Any]) -> list[str]:
    """Lines for the README: a row for each method."""
    gb = figures["checkpoint_bytes"] / 1e9
    lines = [
        f"The same recipes through mergekit {figures['versions']['mergekit']}: {figures['preset']}, {gb:.2f} GB a "
        f"checkpoint, warm; {figures['dtypes']}; whole processes, neither waits for the disk. The checkpoints differ "
        "by whole ulps, so many differences have one size: of those at a threshold, ties and sce keep all.",
        "",
        "| method, checkpoints | ours | mergekit | times | agreement |",
        "|---|---|---|---|---|",
    ]
    for case in figures["cases"]:
        ours, theirs = (case["tools"][tool] for tool in ("ours", "mergekit"))
        cells = [
            f"{found['process_seconds']['median']:.1f} s, {found['owned_bytes'] / 2**20:.0f} MiB"
            for found in (ours, theirs)
        ]
        times = theirs["process_seconds"]["median"] / ours["process_seconds"]["median"]
        lines.append(
            f"| {case['method']}, {case['checkpoints']} | {cells[0]} | {cells[1]} | {times:.1f} | {_agreement(case)} |"
        )
    return lines


def _agreement(case: dict[str, Any]) -> str:
    if case["random"]:
        moved = case["share_moved"]
        return f"at random; {moved['ours']:.2%} of the elements moved, in mergekit {moved['mergekit']:.2%}"
    return f"{case['share_equal']:.4%} equal, largest difference {case['largest_difference']:.1e}"


def _rest(found: dict[str, Any]) -> str:
    owned, resident = (f"{found[key] / 2**20:.0f}" for key in ("owned_bytes", "resident_bytes"))
    process, engine = (found[f"{what}_seconds"]["median"] for what in ("process", "engine"))
    return f"{process:.2f} s; engine {engine:.2f} s; owned {owned} MiB (resident {resident})"
