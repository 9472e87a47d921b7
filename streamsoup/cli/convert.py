"""``streamsoup convert``: a checkpoint in other shards, another dtype, or as safetensors."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from streamsoup.cli import soup
from streamsoup.cli.options import add_execution_options, add_naming_options, add_quantize, add_shard_size, naming_of
from streamsoup.cli.pages import add_command, epilog
from streamsoup.units import parse_bytes

if TYPE_CHECKING:
    from streamsoup.recipe import Recipe

_DESCRIPTION = """\
Write a checkpoint as safetensors, in other shards or another dtype. Tensors whose dtype stays are copied bit for bit;
others are rounded once, to nearest even. It is made like a soup of one checkpoint: under a memory budget, atomically,
and an interrupted conversion can be resumed."""
_EXAMPLES = (
    ("Write other shards", "streamsoup convert run/ out/ --shard-size 2GB"),
    ("Write another dtype", "streamsoup convert run/ out/ --dtype bfloat16"),
    ("Write one file", "streamsoup convert run/ out.safetensors"),
    ("Go on after an interruption", "streamsoup convert --resume out/"),
)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "convert",
        usage=("SOURCE OUT [option ...]", "--resume OUT [option ...]"),
        purpose="write a checkpoint in other shards, another dtype, or as safetensors",
        description=_DESCRIPTION,
        below=epilog(
            files={
                "OUT/*.safetensors": "the checkpoint; with an index if there are several",
                "OUT/streamsoup.json, OUT/recipe.yaml": "what it was made of, for `streamsoup verify`",
                "OUT/README.md, OUT/config.json ...": "the source's, with the new dtype in config.json",
                "OUT.partial/": "unfinished work and its journal: kept after a failure, removed at the end",
            },
            examples=_EXAMPLES,
        ),
    )
    parser.add_argument(
        "ingredients", nargs="?", metavar="SOURCE", help="anything that can be an ingredient of `streamsoup soup`"
    )
    parser.add_argument("output", nargs="?", metavar="OUT", help="a new folder, or a .safetensors file")
    what = parser.add_argument_group("what to make")
    what.add_argument(
        "--dtype", metavar="DTYPE", help="float dtype of the output, such as bfloat16 (default: that of each tensor)"
    )
    add_naming_options(what)
    add_quantize(what)
    add_shard_size(what)
    what.add_argument(
        "--nonfinite",
        choices=("keep", "error", "warn", "allow"),
        help="NaN or infinity in a tensor whose dtype changes: keep counts them in one note, and refuses numbers that "
        "are too large for the new dtype; error refuses both, warn names all, allow says nothing (default: keep; with "
        "--quantize error)",
    )
    add_execution_options(parser)
    parser.set_defaults(
        run=soup.run,
        recipe_of=_recipe,
        guarded=True,
        on_death=soup.after_death,
        verb="converting",
        **dict.fromkeys(
            ("recipe", "method", "base", "parameter", "include", "exclude", "importance", "buffers", "accumulate")
        ),
        **dict.fromkeys(("coefficients", "as_given", "sweep", "score", "metric", "minimize", "score_timeout")),
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    from streamsoup.cli.guard import UsageError
    from streamsoup.converting import default_nonfinite
    from streamsoup.recipe import make_recipe

    if not args.ingredients or not (args.output or args.dry_run):
        raise UsageError("Name the checkpoint and where it goes: streamsoup convert SOURCE OUT.")
    options = {
        "dtype": args.dtype,
        "quantize": args.quantize,
        "shard_bytes": args.shard_size and parse_bytes(args.shard_size),
        **naming_of(args),
    }
    return make_recipe(
        [args.ingredients],
        method="convert",
        nonfinite=args.nonfinite or default_nonfinite(args.quantize),
        **{name: value for name, value in options.items() if value is not None},
    )
