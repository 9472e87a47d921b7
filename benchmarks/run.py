"""Run one benchmark case and write its figures as JSON.

    python benchmarks/run.py CASE [--dir DIR] [--repeats 5] [--json FILE] [--small] [--environments DIR]

Everything is made in a temporary folder below --dir and removed at the end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from environments import DEFAULT_DIR

from streamsoup.bench.machine import machine_facts
from streamsoup.bench.scratch import scratch_folder

CASES = (
    "soup_warm",
    "soup_cold",
    "compare",
    "memory",
    "planning",
    "startup",
    "greedy",
    "learned",
    "peers",
    "mergekit",
    "beyond_ram",
    "many_tensors",
    "scaling",
    "ranks",
)
HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=[c.replace("_", "-") for c in CASES])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/CASE.json (not with --small)")
    parser.add_argument("--small", action="store_true", help="small files: does it work at all?")
    parser.add_argument(
        "--environments", type=Path, default=DEFAULT_DIR, help="of peers: what benchmarks/environments.py made"
    )
    parser.add_argument(
        "--only", default="", metavar="CASE,...", help="of peers: such as 8-bf16; of mergekit: such as ties,slerp"
    )
    args = parser.parse_args()
    name = args.case.replace("-", "_")
    options = {"environments": args.environments, "only": args.only} if name in ("peers", "mergekit") else {}
    before = machine_facts()
    with scratch_folder(args.dir) as folder:
        case = importlib.import_module(f"case_{name}")
        figures = case.run(folder, repeats=args.repeats, small=args.small, **options)
    result = {
        "case": args.case,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "small": args.small,
        "machine": before,
        "load_average_after": machine_facts()["load_average"],
        "figures": figures,
    }
    for label, value in case.table(figures):
        print(f"{label:<58} {value}")
    target = args.json or (None if args.small else HERE / "results" / f"{args.case}.json")
    if target is not None:
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written: {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
