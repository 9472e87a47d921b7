"""``streamsoup learn``: mixing coefficients by gradient descent."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamsoup.cli.guard import UsageError
from streamsoup.cli.options import (
    add_dtype,
    add_naming_options,
    add_output_options,
    add_overwrite,
    add_running_options,
    naming_of,
)
from streamsoup.cli.pages import SOUP_FILES, add_command, add_showing_options, epilog
from streamsoup.cli.printing import naming_json, naming_rows, on_device
from streamsoup.cli.progress import make_progress
from streamsoup.cli.tables import table
from streamsoup.units import format_binary, format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from streamsoup.learning import LearnResult, StepRecord

_DESCRIPTION = """\
Learn how much of each checkpoint goes into the soup, by gradient descent on held-out data. A step takes the network's
gradient and one pass over the checkpoints, which are never held. The same command again goes on where an interrupted
run ended."""
_TASK = """\
  A Python object with the attributes module (the network), loss (a function of logits and targets) and batches (pairs
  of inputs and targets); and, if you like, held_out (batches by which the best epoch is chosen) and forward (a function
  of the network and inputs). Or a function without arguments that makes one."""
_EXAMPLES = (
    ("One coefficient for each checkpoint", "streamsoup learn runs/* --task mine:task -o soup/"),
    ("Coefficients for each layer", "streamsoup learn runs/* --task mine:task --by layer --lr 0.05 -o soup/"),
    ("Polish a greedy soup", "streamsoup learn runs/* --task mine:task --init greedy/ --restrict -o soup/"),
)
_MOST_COLUMNS = 12
_BAR = 30
_OF_JOB = ("parametrisation", "optimizer", "lr", "weight_decay", "epochs", "accumulate", "seed", "patience", "dtype")


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "learn",
        usage=("CHECKPOINT ... --task MODULE:OBJECT -o OUT [option ...]",),
        purpose="learn mixing coefficients on held-out data",
        description=_DESCRIPTION,
        below=epilog(
            task=_TASK,
            files={
                **SOUP_FILES,
                "OUT/learned.json": "coefficients and losses of each step",
                "OUT.work/": "the state after each step (or --workdir): kept after a failure",
            },
            examples=_EXAMPLES,
        ),
    )
    parser.add_argument("ingredients", nargs="*", metavar="CHECKPOINT", help="as in `streamsoup soup`, without weights")
    parser.add_argument("-o", "--output", metavar="OUT", help="a new folder (or a .safetensors file) for the soup")
    parser.add_argument("--task", metavar="MODULE:OBJECT", help="network, loss and batches: see below")
    _add_learning(parser.add_argument_group("learning"))
    how = parser.add_argument_group("how to make it")
    how.add_argument("--workdir", metavar="DIR", help="where each step is kept (default: OUT.work, removed at the end)")
    how.add_argument("--restart", action="store_true", help="throw away what was learned by an earlier run")
    add_dtype(how)
    add_naming_options(how)
    add_output_options(how)
    add_running_options(how)
    add_overwrite(how)
    how.add_argument(
        "--as-given", action="store_true", help="keep the order of the arguments, even if it is alphabetical"
    )
    show = parser.add_argument_group("what to show")
    show.add_argument("--plot", metavar="FILE", help="draw coefficients and loss as PNG, SVG or PDF")
    show.add_argument("--dry-run", action="store_true", help="print what it will take, and learn nothing")
    add_showing_options(show)
    parser.set_defaults(run=run, guarded=True, on_death=after_death)


def _add_learning(group: Any) -> None:
    group.add_argument(
        "--by", choices=("model", "layer", "tensor"), help="what has coefficients of its own (default: model)"
    )
    group.add_argument(
        "--group",
        metavar="PATTERN",
        action="append",
        help="tensors with coefficients of their own; may be repeated (default: by --by)",
    )
    group.add_argument(
        "--parametrisation",
        choices=("softmax", "free"),
        help="softmax: positive, and their sum is one; free: any (default: softmax)",
    )
    group.add_argument("--no-temperature", action="store_true", help="do not learn a factor for the logits")
    group.add_argument("--init", metavar="SOUP", help="begin at this soup's weights (default: uniform)")
    group.add_argument("--restrict", action="store_true", help="leave out checkpoints that --init does without")
    group.add_argument("--optimizer", choices=("adamw", "adam", "sgd"), help="of the coefficients (default: adamw)")
    group.add_argument("--lr", type=float, metavar="X", help="learning rate (default: 0.1)")
    group.add_argument("--weight-decay", type=float, metavar="X", help="how fast coefficients decay (default: 0)")
    group.add_argument("--epochs", type=int, metavar="N", help="passes over the batches (default: 3)")
    group.add_argument("--accumulate", type=int, metavar="N", help="batches to a step (default: 1)")
    group.add_argument("--seed", type=int, metavar="N", help="of the order of batches (default: 0)")
    group.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="epochs without a lower held-out loss, after which to stop (default: never stop early)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from streamsoup.checkpoints import expand_paths, natural_order
    from streamsoup.learning.options import make_learn_job

    logging.getLogger("streamsoup").addHandler(logging.NullHandler())
    _check(args)
    paths = expand_paths(args.ingredients)
    paths = paths if args.as_given else natural_order(paths)
    if args.dry_run:
        how = {
            "by": args.group or args.by or "model",
            "init": args.init or "uniform",
            "restrict": args.restrict,
            "held_out": True,
        }
        options = {name: value for name, value in _options(args).items() if name != "optimizer"}
        _print_forecast(make_learn_job(paths, **how, optimizer=args.optimizer or "adamw", options=options), args)
        return 0
    if args.plot:
        from streamsoup.picture import require_picture

        require_picture(args.plot)
    result = _learn(paths, args)
    if args.plot:
        from streamsoup.learning.picture import draw_learned

        draw_learned(result, args.plot)
    _print_result(result, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    if not args.ingredients:
        raise UsageError("Name the checkpoints to learn from.")
    if not args.task and not args.dry_run:
        raise UsageError("Say what to learn from: --task MODULE:OBJECT.")
    if not args.output and not args.dry_run:
        raise UsageError("Say where the soup goes: -o FOLDER.")
    if args.by and args.group:
        raise UsageError("--by and --group both say what has coefficients of its own. Give one of them.")
    if args.restrict and not args.init:
        raise UsageError("--restrict leaves out what --init does without. Give both.")


def _learn(paths: Sequence[str], args: argparse.Namespace) -> LearnResult:
    from streamsoup.learning import learn
    from streamsoup.learning.network import call_module
    from streamsoup.learning.task import batches_of, blaming, load_task

    task = load_task(args.task)
    held_out = getattr(task, "held_out", None)
    folder = _workdir(args)
    quiet = args.quiet or args.json
    table = _Table(quiet=quiet)
    with make_progress(quiet=quiet, transient=True) as progress:
        result = learn(
            paths,
            task.module,
            blaming("the task's loss", task.loss),
            batches_of(task.batches, "the task's batches"),
            args.output,
            by=args.group or args.by or "model",
            init=args.init or "uniform",
            restrict=args.restrict,
            held_out=None if held_out is None else batches_of(held_out, "the task's held-out batches"),
            optimizer=args.optimizer or "adamw",
            forward=blaming("the task's network", getattr(task, "forward", None) or call_module),
            workdir=folder,
            keep_workdir=args.workdir is not None,  # of the default name nobody asked for it
            restart=args.restart,
            overwrite=args.overwrite,
            on_step=table,
            progress=progress,
            on_compile=progress.compiling,
            **{name: value for name, value in _options(args).items() if name != "optimizer"},
        )
    table.end()
    return result


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the job; None where not given."""
    return {
        **{name: getattr(args, name) for name in _OF_JOB},
        "temperature": False if args.no_temperature else None,
        "shard_bytes": args.shard_size,
        "buffers": args.buffers,
        "nonfinite": args.nonfinite,
        **naming_of(args),
        "budget_bytes": args.budget and parse_bytes(args.budget),
        "device": args.device,
        "device_budget_bytes": args.device_budget and parse_bytes(args.device_budget),
        "workers": args.threads,
        "read_mode": args.read,
    }


def after_death(args: argparse.Namespace) -> None:
    """Say how to go on after a fatal signal."""
    from streamsoup.cli.guard import say

    if args.output and (folder := _workdir(args)).exists():
        say(f"What was learned so far is kept in {folder}; the same command goes on from there.")


def _workdir(args: argparse.Namespace) -> Path:
    return Path(args.workdir or f"{os.path.abspath(args.output)}.work")


class _Table:
    """Prints a line an epoch, and on a terminal says which step it is at."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._steps: list[StepRecord] = []
        self._begun = False

    def __call__(self, record: StepRecord) -> None:
        """Take a step."""
        if self._steps and record.epoch != self._steps[0].epoch:
            self._print()
        self._steps.append(record)
        if self._live:
            text = f"epoch {record.epoch}, step {record.step}: loss {record.loss:.6g}, {record.seconds:.2f} s"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Print the last epoch."""
        if self._steps:
            self._print()

    def _print(self) -> None:
        steps, self._steps = self._steps, []
        if self._quiet:
            return
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if not self._begun:
            self._begun = True
            print("epoch  steps       loss   held-out  temperature  seconds      read")
        last, count = steps[-1], len(steps)
        held_out = "-" if last.held_out is None else f"{last.held_out:.6g}"
        beta = "-" if last.temperature is None else f"{last.temperature:.5g}"
        print(
            f"{last.epoch:>5} {count:>6} {sum(s.loss for s in steps) / count:>10.6g} {held_out:>10} {beta:>12} "
            f"{sum(s.seconds for s in steps):>8.2f} {format_bytes(sum(s.bytes_read for s in steps)):>9}",
            flush=True,
        )


def _print_forecast(job: Any, args: argparse.Namespace) -> None:
    from streamsoup.learning.forecast import LearnForecast
    from streamsoup.learning.plans import open_pool

    pool, plans = open_pool(job)
    found = LearnForecast.of(job, pool, plans)
    if args.json:
        print(json.dumps({**found.to_json(), **naming_json(pool.touched, pool.left_out)}))
        return
    print(f"learned soup of {found.ingredients} checkpoints, {format_bytes(found.bytes_of_ingredients)} together")
    read = found.readings_a_step * found.bytes_of_ingredients
    rows = [
        ("coefficients", f"{found.coefficients:,} free ones, for {found.groups:,} group(s) of tensors"),
        ("a step", f"reads {format_bytes(read)} ({found.readings_a_step:.3g} times each byte)"),
        ("budget", format_binary(found.budget_bytes)),
        ("peak memory", f"{format_binary(found.projected_peak_bytes)} projected, beside the network and its gradient"),
        *[("device", on_device(share)) for share in found.devices],
        *naming_rows(pool.touched, pool.left_out),
    ]
    for label, text in rows:
        print(f"  {label:<12} {text}")


def _print_result(result: LearnResult, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(result.to_json()))
        return
    if args.quiet:
        return
    print()
    print("\n".join(_coefficients(result)))
    chosen = ""
    if result.held_out is not None:
        before, after = f"{result.first_held_out:.6g}", f"{result.held_out:.6g}"
        chosen = f", held-out loss {before} before and {after} after step {result.best_step}"
    beta = "" if result.temperature is None else f", temperature {result.temperature:.5g}"
    print(
        f"\nloss {result.loss:.6g} at the last of {len(result.steps)} steps{chosen}{beta}\n"
        f"read {format_bytes(result.bytes_read)} in {format_seconds(result.seconds)}, peak memory "
        f"{format_binary(result.measured_peak_bytes)} with the network's gradient and activations"
    )
    for note in result.notes:
        print(f"note: {note}")
    if result.path is not None:
        print(f"soup: {result.path}")


def _coefficients(result: LearnResult) -> list[str]:
    from streamsoup.labels import short_labels

    labels = short_labels(result.ingredients)
    if len(result.groups) == 1:
        largest = max(abs(result.coefficients[0]).max(), 1e-300)
        width = max(map(len, labels))
        return [
            f"{label:<{width}} {value:>9.5f}  {'█' * round(_BAR * abs(value) / largest)}"
            for label, value in zip(labels, result.coefficients[0].tolist(), strict=True)
        ]
    if len(labels) > _MOST_COLUMNS:
        return [
            f"{len(result.groups):,} groups of {len(labels)} coefficients are in learned.json; see them with --plot."
        ]
    rows = [
        [name, *(f"{value:.3f}" for value in row)]
        for name, row in zip(result.groups, result.coefficients.tolist(), strict=True)
    ]
    heads = ["", *(str(i + 1) for i in range(len(labels)))]
    names = [f"  {i + 1:>2}  {label}" for i, label in enumerate(labels)]
    return ["coefficients of", *names, "", *table(heads, rows, shutil.get_terminal_size().columns)]
