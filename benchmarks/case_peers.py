"""Uniform soups from a warm page cache: ours and the peers, in turns on the same files, and how exact each is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from environments import ENVIRONMENTS, pinned_version, python_of
from measure import Run, figures_of, run_process, settle
from rounding import load_bits, share_equal, shares_correct

from streamsoup.bench.machine import warm
from streamsoup.bench.synthetic import make_checkpoints

HERE = Path(__file__).resolve().parent
# Ingredients, dtype, preset: at most 10 GB, so that they and what a peer holds stay in 24 GiB of memory.
CASES = [
    (2, "bf16", "vit-g-463m"),
    (2, "f16", "vit-g-463m"),
    (2, "f32", "vit-g-463m"),
    (8, "bf16", "vit-g-463m"),
    (8, "f16", "vit-g-463m"),
    (8, "f32", "vit-l14"),
    (32, "bf16", "vit-50m"),
    (32, "f16", "vit-50m"),
    (32, "f32", "vit-50m"),
]
SMALL_CASES = [(2, dtype, "small-20mb") for dtype in ("bf16", "f16", "f32")]
# Peer of peers.py, its environment, what the table calls it.
PEERS = {
    "torch-sum": ("torch", "torch, running sum in float32"),
    "torch-stack": ("torch", "torch.stack().mean()"),
    "torch-averagedmodel": ("torch", "torch AveragedModel"),
    "mergekit-float32": ("mergekit", "mergekit-pytorch, linear, dtype float32"),
    "mergekit-default": ("mergekit", "mergekit-pytorch, linear, default dtype"),
    "sd-mecha": ("sd-mecha", "sd-mecha, n_average"),
}
_QUIET = {"TQDM_DISABLE": "1"}  # progress bars take time, too; one of mergekit's cannot be turned off


def run(folder: Path, *, repeats: int, small: bool, environments: Path, only: str = "") -> dict[str, Any]:
    """Measure every case (or `only` some, such as ``8-bf16,32-f32``), and say how long, how large and how exact."""
    for name in ENVIRONMENTS:
        python_of(environments, name)  # a missing one is told of before anything is measured
    cases = []
    for ingredients, dtype, preset in SMALL_CASES if small else CASES:
        if only and f"{ingredients}-{dtype}" not in only.split(","):
            continue
        runs = folder / "runs"
        paths = make_checkpoints(preset, runs, ingredients=ingredients, dtype=dtype)
        found = _measure(folder, paths, dtype, repeats, environments)
        cases.append({"ingredients": ingredients, "dtype": dtype, "preset": preset, **found})
        shutil.rmtree(runs)
    return {
        "cache": "warm: every file was read once before",
        "versions": {name: pinned_version(name) for name in ENVIRONMENTS},
        "cases": cases,
    }


def _measure(folder: Path, paths: list[Path], dtype: str, repeats: int, environments: Path) -> dict[str, Any]:
    files = [path / "model.safetensors" for path in paths]
    out = folder / "out"
    ours = [sys.executable, "-m", "streamsoup", "soup", *map(str, paths), "-o", str(out), "--json"]
    commands = {"ours": ours, "ours-unsynced": [*ours, "--no-sync"]}
    for peer, (environment, _) in PEERS.items():
        driver = [python_of(environments, environment), str(HERE / "peers.py"), peer]
        commands[peer] = [*driver, str(out), *map(str, files)]
    warm(files)
    # The first round is not timed: it compiles, loads libraries, and makes what is compared.
    exactness, failures = _compare(folder, paths, dtype, commands)
    warm(files)
    done: dict[str, list[Run]] = {name: [] for name in commands if name not in failures}
    for _ in range(repeats):
        for name, runs in done.items():
            settle()
            runs.append(run_process(commands[name], environment=_QUIET))
            shutil.rmtree(out)
    return {
        "read_bytes": sum(file.stat().st_size for file in files),
        "write_bytes": files[0].stat().st_size,
        "failures": failures,
        "tools": {name: {**figures_of(runs), **exactness[name]} for name, runs in done.items()},
    }


def _compare(
    folder: Path, paths: list[Path], dtype: str, commands: dict[str, list[str]]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Run each once, and return how exact the outputs are, and the exit codes of those that failed."""
    ingredients = [load_bits(path, dtype) for path in paths]
    out, kept = folder / "out", folder / "kept"
    exactness, failures, ours = {}, {}, {}
    for name, command in commands.items():
        try:
            run_process(command, environment=_QUIET)
        except SystemExit as error:
            if name.startswith("ours"):
                raise
            failures[name] = str(error).rsplit(": ", 1)[-1]
            shutil.rmtree(out, ignore_errors=True)
            continue
        if name == "ours":
            out.rename(kept)
            soup = ours = load_bits(kept, dtype)
        else:
            soup = load_bits(out, dtype)
        exactness[name] = {
            "share_correctly_rounded": shares_correct(ingredients, {name: soup}, dtype)[name],
            "share_equal_to_ours": share_equal(soup, ours),
        }
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(kept)
    return exactness, failures


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read: each case, ours in it, then each peer."""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    rows = [
        ("peers", versions),
        (
            "seconds",
            "whole process, with start and imports; engine, without. Peers do not wait for the disk: they are "
            "compared with ours that does not either",
        ),
        ("correct", "elements that are the correctly rounded mean"),
    ]
    for case in figures["cases"]:
        tools = case["tools"]
        ours = tools["ours-unsynced"]
        label = f"{case['ingredients']} x {case['dtype']}"
        rows.append((f"**{label}**", f"{case['preset']}, {case['read_bytes'] / 1e9:.2f} GB, warm"))
        rows.append((f"{label}: ours, durable", _ours(tools["ours"])))
        rows.append((f"{label}: ours, not synced", _ours(ours)))
        for peer, (_, name) in PEERS.items():
            if peer in tools:
                rows.append((f"{label}: {name}", _peer(tools[peer], ours)))
            else:
                rows.append((f"{label}: {name}", f"failed: {case['failures'][peer]}"))
    return rows


def markdown(figures: dict[str, Any]) -> list[str]:
    """Lines for the README: a row for each tool, a column for each case."""
    cases = figures["cases"]
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    heads = [f"{c['ingredients']} × {c['dtype']}, {c['read_bytes'] / 1e9:.1f} GB" for c in cases]
    lines = [
        f"Warm; {versions}. How many times our time: *whole process, with start and imports / engine alone*; neither "
        "waits for the disk, as the peers never do. Below: shares of correctly rounded elements, where not 100 %, and "
        "owned memory.",
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---|' * len(cases)}",
    ]
    for tool, name in {"ours-unsynced": "**ours, not synced**", "ours": "ours, durable"}.items():
        seconds = [[c["tools"][tool][f"{what}_seconds"]["median"] for what in ("process", "engine")] for c in cases]
        lines.append(f"| {name} | {' | '.join(f'{p:.2f} / {e:.2f} s' for p, e in seconds)} |")
    for peer, (_, name) in PEERS.items():
        lines.append(f"| {name} | {' | '.join(_times(c, peer) for c in cases)} |")
    lines.append(f"| *owned, ours* | {' | '.join(_owned(c, ['ours']) for c in cases)} |")
    lines.append(f"| *owned, peers* | {' | '.join(_owned(c, list(PEERS)) for c in cases)} |")
    return lines


def _times(case: dict[str, Any], peer: str) -> str:
    if peer not in case["tools"]:
        return f"failed: {case['failures'][peer]}"
    found, ours = case["tools"][peer], case["tools"]["ours-unsynced"]
    ratios = [found[key]["median"] / ours[key]["median"] for key in ("process_seconds", "engine_seconds")]
    share = found["share_correctly_rounded"]
    wrong = "" if share == 1 else f", {_percent(share, 1)} correct"
    return f"{ratios[0]:.1f} / {ratios[1]:.0f}{wrong}"


def _owned(case: dict[str, Any], tools: list[str]) -> str:
    sizes = [case["tools"][tool]["owned_bytes"] / 2**20 for tool in tools if tool in case["tools"]]
    return f"{min(sizes):.0f}" + (f"-{max(sizes):.0f}" if len(sizes) > 1 else "") + " MiB"


def _ours(found: dict[str, Any]) -> str:
    process, engine = (found[f"{what}_seconds"]["median"] for what in ("process", "engine"))
    return f"{process:.2f} s; engine {engine:.2f} s; {_rest(found)}"


def _peer(found: dict[str, Any], ours: dict[str, Any]) -> str:
    process, engine = found["process_seconds"]["median"], found["engine_seconds"]["median"]
    times = process / ours["process_seconds"]["median"]
    engine_times = engine / ours["engine_seconds"]["median"]
    return f"{process:.2f} s = {times:.1f} x ours; engine {engine:.2f} s = {engine_times:.1f} x; {_rest(found)}"


def _rest(found: dict[str, Any]) -> str:
    owned, resident = (f"{found[key] / 2**20:.0f}" for key in ("owned_bytes", "resident_bytes"))
    return f"owned {owned} MiB (resident {resident}); {_percent(found['share_correctly_rounded'])} correct"


def _percent(share: float, digits: int = 3) -> str:
    """Percent, rounded down: 100 % is said of all only."""
    return "100 %" if share == 1 else f"{int(share * 10 ** (digits + 2)) / 10**digits:.{digits}f} %"
