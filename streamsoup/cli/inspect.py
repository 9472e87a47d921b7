"""``streamsoup inspect``: what is in a checkpoint, and do several fit together."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from streamsoup.cli import compare
from streamsoup.units import format_bytes, format_count

if TYPE_CHECKING:
    from streamsoup.checkpoints import Checkpoint

_EXAMPLES = """\
examples:
  streamsoup inspect runs/a                what is in it
  streamsoup inspect runs/a --tensors      ... tensor by tensor
  streamsoup inspect runs/*                do they fit together, and if not, where
  streamsoup inspect --compare runs/* --base start --html report.html
                                           how far apart are they, and where do they disagree
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "inspect",
        help="show what is in checkpoints, and whether they fit together",
        description="Show what is in checkpoints, from their headers alone; with several, whether they fit together "
        "(exit code 1 if not). With --compare, what their numbers are like.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    compare.add_options(parser)
    parser.set_defaults(run=run, guarded=True)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.compare:
        return compare.run(args)
    compare.refuse_options(args)
    from streamsoup.align import find_mismatches
    from streamsoup.checkpoints import expand_paths, natural_order, open_checkpoints

    checkpoints = open_checkpoints(natural_order(expand_paths(args.checkpoints)))
    first = checkpoints[0]
    problems = [p for other in checkpoints[1:] for p in find_mismatches(first, other)]
    if args.json:
        document = {
            "checkpoints": [_facts(c, tensors=args.tensors) for c in checkpoints],
            "problems": problems,
        }
        print(json.dumps(document))
        return 1 if problems else 0
    for checkpoint in checkpoints:
        _print(checkpoint, tensors=args.tensors)
    if len(checkpoints) > 1:
        if problems:
            print(f"They do not fit together ({len(problems)} difference(s) from {first.path}):")
        else:
            print(f"All {len(checkpoints)} fit together: same names, shapes and kinds.")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def _facts(checkpoint: Checkpoint, *, tensors: bool) -> dict[str, Any]:
    table = checkpoint.table
    positions = range(len(table))
    dtypes = Counter(table.dtype(t).name for t in positions)
    facts: dict[str, Any] = {
        "path": checkpoint.path,
        "files": [{"path": s.path, "size_bytes": s.size_bytes} for s in checkpoint.shards],
        "tensors": len(table),
        "parameters": sum(int(table.elements[t]) for t in positions if table.dtype(t).is_float),
        "bytes": int(table.nbytes.sum()),
        "dtypes": dict(dtypes.most_common()),
        "metadata": dict(checkpoint.metadata),
    }
    if tensors:
        facts["tensor_list"] = [
            {
                "name": table.names[t],
                "dtype": table.dtype(t).name,
                "shape": list(table.shape(t)),
                "file": checkpoint.shards[table.shards[t]].path,
            }
            for t in positions
        ]
    return facts


def _print(checkpoint: Checkpoint, *, tensors: bool) -> None:
    facts = _facts(checkpoint, tensors=tensors)
    dtypes = ", ".join(f"{count:,} {name}" for name, count in facts["dtypes"].items())
    print(
        f"{checkpoint.path}\n  {facts['tensors']:,} tensors ({dtypes}), {format_count(facts['parameters'])} "
        f"parameters, {format_bytes(facts['bytes'])} in {len(checkpoint.shards)} file(s)"
    )
    if not tensors:
        return
    width = max((len(row["name"]) for row in facts["tensor_list"]), default=0)
    for row in facts["tensor_list"]:
        print(f"    {row['name']:<{width}}  {row['dtype']:<8} {tuple(row['shape'])}")
