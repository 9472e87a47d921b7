"""``streamsoup mergekit``: soups of mergekit's recipes."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from streamsoup.cli import soup
from streamsoup.cli.options import add_execution_options, add_output_options
from streamsoup.units import parse_bytes

if TYPE_CHECKING:
    from streamsoup.recipe import Recipe

_TEXT = """\
example:
  streamsoup mergekit ties.yml soup/              make it
  streamsoup mergekit ties.yml soup/ --dry-run    only the plan

where ties.yml is
  merge_method: ties
  base_model: runs/start
  models:
    - {model: runs/a, parameters: {weight: 0.6, density: 0.5}}
    - {model: runs/b, parameters: {weight: 0.4, density: 0.5}}
  parameters: {lambda: 1.0}
  dtype: bfloat16

methods: linear, slerp, nuslerp, multislerp, karcher, task_arithmetic, ties, dare_linear, dare_ties, della,
  della_linear, breadcrumbs, breadcrumbs_ties, sce, model_stock, passthrough

It is computed in float64 whatever `dtype` says; that, or `out_dtype`, is the dtype of the soup. Every tensor of the
checkpoints is merged, under its own name; mergekit takes those that it knows the architecture to have.

not supported, and refused: models that are not on this disk, LoRA adapters (model+adapter), tokenizers that are
  rearranged (tokenizer_source: union, tokens, padding), chat_template, modules, mixtures of experts, the methods
  nearswap, arcee_fusion and ram; slices, but for layers picked by passthrough and for one slice of whole models.
  Keys and parameters that mergekit does not know, and leaves out, are refused too. See docs/mergekit.md.
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "mergekit",
        help="merge by a recipe of mergekit",
        description="Merge checkpoints by a recipe in mergekit's YAML.",
        epilog=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="mergekit's YAML; paths are seen from the current folder")
    parser.add_argument("output", metavar="OUT", help="a new folder, or a .safetensors file")
    recipe = parser.add_argument_group("what to make")
    recipe.add_argument(
        "--random-seed",
        type=int,
        metavar="N",
        help="for methods that drop at random (default: 0); not mergekit's numbers",
    )
    add_output_options(recipe)
    add_execution_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and read nothing but headers")
    parser.set_defaults(
        run=soup.run,
        recipe_of=_recipe,
        guarded=True,
        on_death=soup.after_death,
        verb="souping",
        resume=None,
        sweep=None,
        score=None,
        metric=None,
        minimize=False,
        score_timeout=None,
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    from streamsoup.from_mergekit_config import from_mergekit

    recipe = from_mergekit(args.config, random_seed=args.random_seed)
    return dataclasses.replace(
        recipe,
        shard_bytes=parse_bytes(args.shard_size) if args.shard_size else recipe.shard_bytes,
        buffers=args.buffers or recipe.buffers,
        nonfinite=args.nonfinite or recipe.nonfinite,
    )
