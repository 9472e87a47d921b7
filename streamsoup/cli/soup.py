"""``streamsoup soup``: soups, by any method."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from streamsoup.cli.options import (
    add_accumulate,
    add_dtype,
    add_execution_options,
    add_naming_options,
    add_output_options,
    add_quantize,
    naming_of,
)
from streamsoup.cli.pages import SOUP_FILES, add_command, epilog
from streamsoup.cli.printing import print_plan, print_result
from streamsoup.units import parse_bytes

if TYPE_CHECKING:
    from streamsoup.device_share import DeviceShare
    from streamsoup.execution import Execution, SoupResult
    from streamsoup.plan import Plan
    from streamsoup.recipe import Recipe

_DESCRIPTION = """\
Average checkpoints of one network into one, uniformly or by weights, or merge them by another method. Each byte is read
once, but for large tensors that must be measured first; memory depends on neither the number nor the size of the
checkpoints. The soup appears whole or not at all, and an interrupted run can be resumed to the same bits."""
_CHECKPOINTS = """\
  A checkpoint is a .safetensors file, or a folder with one or with shards and an index; a file of torch.save or a
  folder of torch.distributed.checkpoint; or base+adapter: see docs/ingredients.md. The first (or the base) gives names,
  their order, dtypes and configuration files. A list in plain alphabetical order, as a shell leaves it, is put into
  natural order (run2 before run10); any other order is kept."""
_EXAMPLES = (
    ("Average three checkpoints", "streamsoup soup runs/a runs/b runs/c -o soup/"),
    ("Weigh them, and round to bfloat16", "streamsoup soup runs/a:0.7 runs/b:0.3 -o soup/ --dtype bfloat16"),
    ("Apply numbers as given", "streamsoup soup --coefficients start:-1 a:1 b:1 -o soup/"),
    ("Merge by TIES", "streamsoup soup --method ties --base start runs/* -o soup/ -p density=0.3"),
    ("Make a soup again from its recipe", "streamsoup soup --recipe soup/recipe.yaml -o again/"),
    ("Print only the plan", "streamsoup soup runs/* -o soup/ --dry-run"),
    ("Go on after an interruption", "streamsoup soup --resume soup/"),
)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    from streamsoup.methods.catalogue import describe_methods

    parser = add_command(
        commands,
        "soup",
        usage=(
            "CHECKPOINT[:WEIGHT] ... -o OUT [option ...]",
            "--recipe FILE -o OUT [option ...]",
            "--resume OUT [option ...]",
        ),
        purpose="average checkpoints into one",
        description=_DESCRIPTION,
        below=epilog(
            checkpoints=_CHECKPOINTS,
            methods_and_their_parameters=describe_methods(),
            files={
                **SOUP_FILES,
                "OUT.partial/": "unfinished work and its journal: kept after a failure, removed at the end",
            },
            examples=_EXAMPLES,
        ),
    )
    parser.add_argument(
        "ingredients",
        nargs="*",
        metavar="CHECKPOINT[:WEIGHT]",
        help="what to average, each with its weight (default: 1): a .safetensors file, a folder, PyTorch's files, "
        "org/name[@revision] of the Hugging Face Hub, base+adapter; see docs/ingredients.md",
    )
    parser.add_argument("-o", "--output", metavar="OUT", help="a new folder, or a .safetensors file")
    _add_recipe(parser.add_argument_group("what to make"))
    _add_sweep(parser.add_argument_group("trying several values of a parameter"))
    add_execution_options(parser)
    parser.set_defaults(run=run, recipe_of=_recipe, guarded=True, on_death=after_death, verb="souping")


def _add_recipe(group: Any) -> None:
    group.add_argument("--recipe", metavar="FILE", help="read ingredients and options from a YAML recipe")
    group.add_argument(
        "--coefficients",
        action="store_true",
        help="do not divide by the sum of the weights: apply them as given",
    )
    group.add_argument("--method", metavar="NAME", help="how to combine them, see below (default: linear)")
    group.add_argument("--base", metavar="CHECKPOINT", help="what they were fine-tuned from, for methods that want it")
    group.add_argument(
        "-p",
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the method, such as density=0.3; a list is a gradient over the layers, such as "
        "t=[0,0.5,1]; may be repeated",
    )
    group.add_argument(
        "--importance",
        nargs="+",
        metavar="CHECKPOINT",
        help="for method fisher: checkpoints that say how much each element of each one matters",
    )
    group.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="combine only tensors with such names, and take the others from the first checkpoint (or the base); "
        "may be repeated (default: all)",
    )
    group.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="do not combine tensors with such names; may be repeated (default: none)",
    )
    add_naming_options(group)
    add_dtype(group)
    add_quantize(group)
    add_output_options(group)
    add_accumulate(group)
    group.add_argument(
        "--as-given", action="store_true", help="keep the order of the arguments, even if it is alphabetical"
    )


def _add_sweep(group: Any) -> None:
    group.add_argument(
        "--sweep",
        metavar="[NAME=]START:STOP:STEP",
        help="make and score a soup for each value of a parameter, and keep the best (default NAME: alpha)",
    )
    group.add_argument("--score", metavar="COMMAND", help="command that scores a checkpoint, as in `streamsoup greedy`")
    group.add_argument(
        "--metric",
        metavar="KEY",
        help="key (dotted path) of the JSON that it prints (default: its last line is the score)",
    )
    group.add_argument("--minimize", action="store_true", help="a lower score is better")
    group.add_argument(
        "--score-timeout",
        type=float,
        metavar="SECONDS",
        help="longest that one evaluation may take (default: no limit)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from streamsoup.cli.guard import UsageError
    from streamsoup.cli.progress import make_progress

    # numba looks for scipy, whose import takes as long as numba's own. This process is ours, and needs none.
    sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]
    from streamsoup.cook import cook, resume
    from streamsoup.soup_plan import plan_soup

    logging.getLogger("streamsoup").addHandler(logging.NullHandler())
    distributed, other = args.rank is not None, bool(args.rank)  # one of several prints
    with make_progress(quiet=args.quiet or args.json or other, verb=args.verb) as progress:
        execution = _execution(args, progress, distributed=distributed)
        if distributed and (args.sweep or args.dry_run):
            raise UsageError("--sweep and --dry-run run in one process. Leave torchrun out.")
        if args.resume:
            if args.ingredients or args.recipe or args.output or args.dry_run:
                raise UsageError("--resume takes everything from the interrupted run; give it alone.")
            if args.restart:
                raise UsageError("--restart throws away the work that --resume goes on with. Give one of them.")
            if args.sweep or args.score:
                raise UsageError(
                    "--resume goes on with one soup. Give the command with --sweep again to go on with it."
                )
            if args.no_sync:
                raise UsageError("--resume always waits for the disk. Leave --no-sync out.")
            if args.method or args.base or args.parameter or args.include or args.exclude or args.importance:
                raise UsageError("--resume keeps method, base and parameters of the interrupted run; give it alone.")
            if any(value is not None for value in naming_of(args).values()):
                raise UsageError("--resume names and finds tensors as the interrupted run did; give it alone.")
            making = ("dtype", "quantize", "shard_size", "buffers", "accumulate", "coefficients", "as_given")
            if any(getattr(args, name) for name in making):
                raise UsageError(
                    "--resume keeps --dtype, --quantize, --shard-size, --buffers, --accumulate and --coefficients of "
                    "the interrupted run; for others begin anew with --restart."
                )
            result = resume(args.resume, execution, nonfinite=args.nonfinite)
        else:
            recipe = args.recipe_of(args)
            if args.dry_run:
                plan, mode = plan_soup(recipe, args.output, execution)
                print_plan(plan, recipe, mode, _shares(plan, execution), execution.device, args)
                return 0
            if not args.output:
                raise UsageError("Say where the soup goes: -o FOLDER or -o FILE.safetensors.")
            if not args.sweep and (args.metric or args.minimize or args.score_timeout):
                raise UsageError("--metric, --minimize and --score-timeout belong to --sweep.")
            if bool(args.sweep) != bool(args.score):
                raise UsageError("--sweep and --score belong together: each value's soup is scored by the command.")
            result = _sweep(recipe, execution, args) if args.sweep else cook(recipe, args.output, execution)
    if not other:
        print_result(result, args)
    return 0


def _shares(plan: Plan, execution: Execution) -> tuple[DeviceShare, ...]:
    """Ask devices what they have; the CPU's backend would only be imported for nothing."""
    if execution.device == "cpu":
        return ()
    from streamsoup.backends import open_backend

    return open_backend(execution.device, execution.device_budget_bytes).shares(plan.tiling, plan.needs)


def _sweep(recipe: Recipe, execution: Execution, args: argparse.Namespace) -> SoupResult:
    from streamsoup.score import CommandScore
    from streamsoup.sweeping import parse_sweep, sweep

    name, values = parse_sweep(args.sweep)
    quiet = args.quiet or args.json

    def say(value: float, score: float) -> None:
        if not quiet:
            print(f"{name} {value:<8g} score {score:.6g}", flush=True)

    found = sweep(
        recipe,
        args.output,
        CommandScore(args.score, args.metric, (), args.score_timeout),
        name=name,
        values=values,
        execution=dataclasses.replace(execution, progress=None),
        minimize=args.minimize,
        said=json.dumps([args.score, args.metric]),
        on_trial=say,
    )
    if not quiet:
        print(f"best: {name} {found.best:g}")
    return found.soup


_STARTED = time.time()


def after_death(args: argparse.Namespace) -> None:
    """Say what is left after a fatal signal, or remove it."""
    from streamsoup.cli.guard import say
    from streamsoup.workspace import Workspace, destination_of

    out = args.resume or args.output
    workspace = Workspace(destination_of(out)) if out else None
    if workspace is None or not workspace.exists:
        return
    if args.no_keep and not workspace.is_held and workspace.begun_at > _STARTED:  # else it is another run's
        workspace.remove()
    elif not args.no_keep:
        say(f"Unfinished work is kept in {workspace.folder}; go on with `streamsoup soup --resume {out}`.")


def _execution(args: argparse.Namespace, progress: Any, *, distributed: bool) -> Execution:
    from streamsoup.execution import Execution

    return Execution(
        budget_bytes=None if args.budget is None else parse_bytes(args.budget),
        device=args.device or "cpu",
        device_budget_bytes=None if args.device_budget is None else parse_bytes(args.device_budget),
        workers=args.threads,
        read_mode=args.read or "auto",
        overwrite=args.overwrite,
        keep=not args.no_keep,
        restart=args.restart,
        durable=not args.no_sync,
        distributed=distributed,
        progress=progress,
        on_compile=progress.compiling,
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    from streamsoup.checkpoints import expand_paths, natural_order
    from streamsoup.cli.guard import UsageError
    from streamsoup.recipe import make_recipe, read_recipe

    options: dict[str, Any] = {
        name: value
        for name, value in (
            ("dtype", args.dtype),
            ("quantize", args.quantize),
            ("shard_bytes", args.shard_size and parse_bytes(args.shard_size)),
            ("buffers", args.buffers),
            ("nonfinite", args.nonfinite),
            ("accumulate", args.accumulate),
            ("method", args.method),
            ("base", args.base),
            ("include", args.include),
            ("exclude", args.exclude),
            ("parameters", _parameters(args.parameter) or None),
            *naming_of(args).items(),
        )
        if value is not None
    }
    if args.recipe:
        if args.ingredients:
            raise UsageError("Give checkpoints or --recipe, not both.")
        if args.importance:
            raise UsageError("With --recipe, importances stand in the file, beside their checkpoints.")
        recipe = read_recipe(args.recipe)
        options["parameters"] = {**recipe.parameters, **options.get("parameters", {})}
        recipe = dataclasses.replace(recipe, **options)
        return dataclasses.replace(recipe, normalize=False) if args.coefficients else recipe
    if not args.ingredients:
        raise UsageError("Name the checkpoints to average, or a recipe with --recipe.")
    pairs = [_split_weight(text) for text in args.ingredients]
    paths = [path for path, _ in pairs]
    weights: list[float] | None = [1.0 if weight is None else weight for _, weight in pairs]
    if all(weight is None for _, weight in pairs):
        paths, weights = expand_paths(paths), None
        if not args.as_given:
            paths = natural_order(paths)
    if args.coefficients:
        return make_recipe(paths, coefficients=weights or [1.0] * len(paths), **options)
    return make_recipe(paths, weights=weights, importances=args.importance, **options)


def _parameters(pairs: list[str]) -> dict[str, Any]:
    """Read ``name=value``; a value is YAML: a number, a word, a list."""
    from streamsoup.cli.guard import UsageError

    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise UsageError(f"--parameter {pair}: write it as name=value.")
        import yaml

        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--parameter {pair}: {value!r} is neither a number, a word nor a list.") from None
    return found


def _split_weight(text: str) -> tuple[str, float | None]:
    """Take the weight off ``path:0.7``; a path that exists as it is keeps its colon."""
    path, colon, number = text.rpartition(":")
    if not colon or not path or os.path.exists(text):
        return text, None
    try:
        return path, float(number)
    except ValueError:
        return text, None
