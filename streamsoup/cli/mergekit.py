"""``streamsoup mergekit``: soups of mergekit's recipes."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from streamsoup.cli import soup
from streamsoup.cli.options import add_accumulate, add_execution_options, add_output_options
from streamsoup.cli.pages import SOUP_FILES, add_command, epilog
from streamsoup.units import parse_bytes

if TYPE_CHECKING:
    from streamsoup.recipe import Recipe

_DESCRIPTION = """\
Merge checkpoints by a recipe in mergekit's YAML, through this engine: computed in float64 whatever its dtype says
(but see --accumulate), which is, like out_dtype, the dtype of the soup. Every tensor of the checkpoints is merged,
under its own name; mergekit takes those that it knows the architecture to have."""
_CONFIG = """\
    merge_method: ties
    base_model: runs/start
    models:
      - {model: runs/a, parameters: {weight: 0.6, density: 0.5}}
      - {model: runs/b, parameters: {weight: 0.4, density: 0.5}}
    parameters: {lambda: 1.0}
    dtype: bfloat16"""
_METHODS = """\
  linear, slerp, nuslerp, multislerp, karcher, task_arithmetic, ties, dare_linear, dare_ties, della, della_linear,
  breadcrumbs, breadcrumbs_ties, sce, model_stock, passthrough"""
_REFUSED = """\
  LoRA adapters (model+adapter), tokenizers that are rearranged (tokenizer_source:
  union, tokens, padding), chat_template, modules, mixtures of experts, the methods nearswap, arcee_fusion and ram;
  slices, but for layers picked by passthrough and for one slice of whole models. Keys and parameters that mergekit does
  not know, and leaves out, are refused too. See docs/mergekit.md."""
_EXAMPLES = (
    ("Merge", "streamsoup mergekit ties.yml soup/"),
    ("Print only the plan", "streamsoup mergekit ties.yml soup/ --dry-run"),
    ("Go on after an interruption", "streamsoup soup --resume soup/"),
)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "mergekit",
        usage=("CONFIG OUT [option ...]",),
        purpose="merge by a recipe of mergekit",
        description=_DESCRIPTION,
        below=epilog(config=_CONFIG, methods=_METHODS, not_supported=_REFUSED, files=SOUP_FILES, examples=_EXAMPLES),
    )
    parser.add_argument("config", metavar="CONFIG", help="mergekit's YAML; paths are seen from the current folder")
    parser.add_argument("output", metavar="OUT", help="a new folder, or a .safetensors file")
    recipe = parser.add_argument_group("what to make")
    recipe.add_argument(
        "--random-seed",
        type=int,
        metavar="N",
        help="of methods that drop at random; they are not mergekit's numbers (default: 0)",
    )
    add_output_options(recipe)
    add_accumulate(recipe)
    add_execution_options(parser, resumes=False)
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
        accumulate=args.accumulate or recipe.accumulate,
    )
