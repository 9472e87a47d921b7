"""``streamsoup inspect``: what is in a checkpoint, and do several fit together."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from streamsoup.cli import compare
from streamsoup.cli.options import add_naming_options, naming_of
from streamsoup.cli.pages import EXIT_STATUS, add_command, add_showing_options, epilog
from streamsoup.cli.printing import naming_json, naming_rows
from streamsoup.units import format_bytes, format_count

if TYPE_CHECKING:
    from streamsoup.checkpoints import Checkpoint

_DESCRIPTION = """\
Show what is in checkpoints, from their headers alone; of several, whether they fit together and, if not, where. With
--compare, what their numbers are like: norms, distances, cosines, sign conflicts, duplicates, NaN."""
_EXAMPLES = (
    ("Show what is in a checkpoint", "streamsoup inspect runs/a"),
    ("... tensor by tensor", "streamsoup inspect runs/a --tensors"),
    ("Do they fit together, and if not, where", "streamsoup inspect runs/*"),
    ("How far apart are they, and where do they disagree", "streamsoup inspect --compare runs/* --base start"),
    ("What is in a repository of the Hugging Face Hub", "streamsoup inspect org/name"),
    ("The same as a page with pictures", "streamsoup inspect --compare runs/* --html report.html"),
)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "inspect",
        usage=("CHECKPOINT ... [option ...]", "--compare CHECKPOINT ... [option ...]"),
        purpose="show what is in checkpoints, and whether they fit together",
        description=_DESCRIPTION,
        below=epilog(
            exit_status={**EXIT_STATUS, "1": "they do not fit together, or an error"},
            files={"FILE": "of --html: a page that needs nothing but itself"},
            examples=_EXAMPLES,
        ),
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="as in `streamsoup soup`")
    add_naming_options(parser.add_argument_group("how tensors are named"))
    compare.add_options(parser)
    show = parser.add_argument_group("what to show")
    show.add_argument("--tensors", action="store_true", help="list every tensor")
    add_showing_options(show, quiet="show no progress")
    parser.set_defaults(run=run, guarded=True)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.compare:
        return compare.run(args)
    compare.refuse_options(args)
    from streamsoup.align import find_mismatches
    from streamsoup.checkpoints import Opening, advice_on, expand_paths, natural_order, open_together

    opening = Opening(**{name: value for name, value in naming_of(args).items() if value is not None})
    opened = open_together(natural_order(expand_paths(args.checkpoints)), opening)
    checkpoints = opened.checkpoints
    first = checkpoints[0]
    problems = [p for other in checkpoints[1:] for p in find_mismatches(first, other)]
    if args.json:
        document = {
            "checkpoints": [_facts(c, tensors=args.tensors) for c in checkpoints],
            "problems": problems,
            **naming_json(opened.touched, opened.left_out),
        }
        print(json.dumps(document))
        return 1 if problems else 0
    for checkpoint in checkpoints:
        _print(checkpoint, tensors=args.tensors)
    for label, text in naming_rows(opened.touched, opened.left_out):
        print(f"{label}: {text}")
    if len(checkpoints) > 1:
        if problems:
            print(f"They do not fit together ({len(problems)} difference(s) from {first.path}):")
        else:
            print(f"All {len(checkpoints)} fit together: same names, shapes and kinds.")
    for problem in problems:
        print(f"  {problem}")
    if problems:
        print(advice_on(checkpoints))
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
