"""``streamsoup convert``: a checkpoint in other shards, another dtype, or as safetensors."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from streamsoup.cli import soup
from streamsoup.cli.options import add_execution_options
from streamsoup.units import parse_bytes

if TYPE_CHECKING:
    from streamsoup.recipe import Recipe

_EXAMPLES = """\
examples:
  streamsoup convert run/ out/ --shard-size 2GB       other shards
  streamsoup convert run/ out/ --dtype bfloat16       another dtype
  streamsoup convert run/ out.safetensors             one file
  streamsoup convert --resume out/                    go on after an interruption
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in other shards, another dtype, or as safetensors",
        description="Write a checkpoint in other shards or another dtype, as safetensors.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "ingredients", nargs="?", metavar="SOURCE", help="anything that can be an ingredient of `streamsoup soup`"
    )
    parser.add_argument("output", nargs="?", metavar="OUT", help="a new folder, or a .safetensors file")
    what = parser.add_argument_group("what to make")
    what.add_argument("--dtype", help="float dtype of the output (default: that of each tensor)")
    what.add_argument("--shard-size", metavar="SIZE", help="largest output file (default: 5GB)")
    what.add_argument(
        "--nonfinite",
        choices=("keep", "error", "warn", "allow"),
        help="NaN or infinity in a tensor whose dtype changes: keep (default) counts them in one note, and refuses "
        "numbers that are too large for the new dtype; error refuses both, warn names all, allow says nothing",
    )
    what.add_argument("--resume", metavar="OUT", help="go on with an interrupted conversion")
    what.add_argument("--dry-run", action="store_true", help="print the plan and read nothing but headers")
    add_execution_options(parser)
    parser.set_defaults(
        run=soup.run,
        recipe_of=_recipe,
        guarded=True,
        on_death=soup.after_death,
        verb="converting",
        **dict.fromkeys(("recipe", "method", "base", "parameter", "include", "exclude", "importance", "buffers")),
        **dict.fromkeys(("coefficients", "as_given", "sweep", "score", "metric", "minimize", "score_timeout")),
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    from streamsoup.cli.guard import UsageError
    from streamsoup.recipe import make_recipe

    if not args.ingredients or not (args.output or args.dry_run):
        raise UsageError("Name the checkpoint and where it goes: streamsoup convert SOURCE OUT.")
    options = {"dtype": args.dtype, "shard_bytes": args.shard_size and parse_bytes(args.shard_size)}
    return make_recipe(
        [args.ingredients],
        method="convert",
        nonfinite=args.nonfinite or "keep",
        **{name: value for name, value in options.items() if value is not None},
    )
