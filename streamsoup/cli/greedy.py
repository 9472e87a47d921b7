"""``streamsoup greedy``: keep what helps."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamsoup.cli.greedy_printing import Table, print_forecast, print_result
from streamsoup.cli.guard import UsageError
from streamsoup.cli.options import add_running_options
from streamsoup.cli.progress import make_progress
from streamsoup.units import parse_bytes

if TYPE_CHECKING:
    from streamsoup.greedy_job import GreedyJob

_EXAMPLES = """\
examples:
  streamsoup greedy runs/* --score "python eval.py --model {soup}" -o soup/
  streamsoup greedy runs/* --score "..." --metric accuracy --order scores.json --workdir work/ -o soup/
  streamsoup greedy runs/* --score "..." --prune -o soup/          start from all, drop what does not help
  streamsoup greedy --resume work/                                 go on after an interruption

The score is the last line that the command prints, or with --metric a key of JSON that it prints last (or writes to
{result}). {soup} is a checkpoint folder (a file, where the ingredients are files), {soup_file} its one .safetensors
file. With --jobs several commands run at once; each may choose its device by STREAMSOUP_JOB, which is 0, 1 ...:
  --jobs 4 --score 'sh -c "CUDA_VISIBLE_DEVICES=$STREAMSOUP_JOB exec python eval.py --model $0" {soup}'
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "greedy",
        help="average those checkpoints that help, by a held-out score",
        description="Sort checkpoints by held-out score, and keep each one whose addition does not lower the\n"
        "soup's. A trial reads one checkpoint and the running sum, whatever was kept before.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ingredients", nargs="*", metavar="CHECKPOINT", help="as in `streamsoup soup`")
    parser.add_argument("-o", "--output", metavar="OUT", help="a new folder for the soup")
    parser.add_argument("--resume", metavar="WORKDIR", help="go on with an interrupted run")
    _add_scoring(parser.add_argument_group("scoring"))
    _add_rule(parser.add_argument_group("deciding"))
    how = parser.add_argument_group("how to make it")
    how.add_argument("--workdir", metavar="DIR", help="for scores and sums (default: OUT.work, removed at the end)")
    how.add_argument("--candidates", metavar="DIR", help="for candidates, such as a RAM disk (default: in the workdir)")
    how.add_argument("--dtype", help="float dtype of the soup (default: the first checkpoint's)")
    how.add_argument("--sums-dtype", choices=("float64", "float32"), help="of running sums (default: float64)")
    how.add_argument(
        "--sums", choices=("auto", "device", "host", "disk"), help="where running sums are kept (default: by room)"
    )
    how.add_argument("--shard-size", metavar="SIZE", help="largest output file (default: 5GB)")
    how.add_argument("--buffers", choices=("identical", "first"), help="as in `streamsoup soup`")
    how.add_argument("--nonfinite", choices=("error", "warn", "allow"), help="as in `streamsoup soup`")
    add_running_options(how)
    how.add_argument("--overwrite", action="store_true", help="replace a soup that exists")
    show = parser.add_argument_group("what to show")
    show.add_argument("--plot", metavar="FILE", help="draw the run as PNG or SVG")
    show.add_argument("--dry-run", action="store_true", help="print what it will need, and score nothing")
    show.add_argument("--json", action="store_true", help="print the result as JSON")
    show.add_argument("--quiet", action="store_true", help="print nothing but errors")
    show.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.set_defaults(run=run, guarded=True, on_death=after_death)


def _add_scoring(group: Any) -> None:
    group.add_argument("--score", metavar="COMMAND", help="command that scores a checkpoint")
    group.add_argument("--metric", metavar="KEY", help="key (dotted path) of the JSON that decides")
    group.add_argument("--also", metavar="KEY", action="append", help="further key to record; may be repeated")
    group.add_argument("--minimize", action="store_true", help="lower is better")
    group.add_argument("--score-timeout", type=float, metavar="SECONDS", help="longest that one evaluation may take")
    group.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="score the next N candidates at once, with the same decisions (default: 1); a command finds 0 to N-1 in "
        "STREAMSOUP_JOB",
    )
    group.add_argument("--before-score", metavar="COMMAND", help="run on each candidate first (BatchNorm statistics)")


def _add_rule(group: Any) -> None:
    group.add_argument(
        "--accept", choices=("ge", "gt"), help="keep what does not lower the score (ge, default) or only what raises it"
    )
    group.add_argument("--tolerance", type=float, metavar="X", help="how far below still counts as not lower")
    group.add_argument(
        "--order",
        metavar="HOW",
        help="score (default), given, random, or a JSON or CSV file with the checkpoints' own scores",
    )
    group.add_argument("--as-given", action="store_true", help="take equal scores in the order of the arguments")
    group.add_argument("--seed", type=int, metavar="N", help="of a random order")
    group.add_argument("--max-ingredients", type=int, metavar="N", help="most that may be kept")
    group.add_argument("--prune", action="store_true", help="start from all, and drop what does not help")
    group.add_argument("--rounds", type=int, metavar="N", help="go through the list so often; one may enter again")
    group.add_argument("--restarts", type=int, metavar="N", help="further runs in random order; the best wins")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from streamsoup.greedy_cook import cook_greedy, resume_greedy

    logging.getLogger("streamsoup").addHandler(logging.NullHandler())
    quiet = args.quiet or args.json
    table = Table(quiet=quiet)
    if args.plot:
        from streamsoup.picture import draw_greedy, require_picture

        require_picture(args.plot)
    with make_progress(quiet=quiet, transient=True) as progress:
        if args.resume:
            _refuse_more(args)
            folder = Path(args.resume)
            result = resume_greedy(
                folder, on_trial=table, on_score=table.alone, progress=progress, **_making_options(args)
            )
            # The default name: nobody asked for it.
            owned = result.path is not None and os.path.abspath(folder) == f"{result.path}.work"
        else:
            job = _job(args)
            if args.dry_run:
                print_forecast(job, _forecast_folder(args), as_json=args.json)
                return 0
            folder, owned = _workdir(args), args.workdir is None
            result = cook_greedy(job, workdir=folder, on_trial=table, on_score=table.alone, progress=progress)
    if owned and result.path is not None:
        _remove_workdir(folder)
    if args.plot:
        draw_greedy(result, args.plot, metric=args.metric)
    if args.json:
        print(json.dumps(result.to_json()))
    elif not args.quiet:
        print_result(result)
    return 0


# What may be given with --resume: it changes nothing that is decided.
_WITH_RESUME = {
    *("budget", "candidates", "device", "device_budget", "jobs", "nonfinite", "overwrite", "read"),
    *("score_timeout", "threads"),
    *("command", "resume", "plot", "json", "quiet", "debug", "run", "guarded", "on_death"),
}


def _making_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options that decide nothing; None where not given."""
    return {
        "budget_bytes": args.budget and parse_bytes(args.budget),
        "candidates": args.candidates and os.path.abspath(args.candidates),
        "device": args.device,
        "jobs": args.jobs,
        "device_budget_bytes": args.device_budget and parse_bytes(args.device_budget),
        "nonfinite": args.nonfinite,
        "overwrite": args.overwrite or None,
        "read_mode": args.read,
        "timeout_seconds": args.score_timeout,
        "workers": args.threads,
    }


def _refuse_more(args: argparse.Namespace) -> None:
    """Refuse what would be ignored: a resumed run takes everything from its work folder."""
    more = [name for name, value in vars(args).items() if name not in _WITH_RESUME and value not in (None, False, [])]
    if more:
        word = "CHECKPOINT" if more[0] == "ingredients" else f"--{more[0].replace('_', '-')}"
        raise UsageError(f"{word} cannot be given with --resume, which takes everything from the work folder.")


def after_death(args: argparse.Namespace) -> None:
    """Say how to go on after a fatal signal."""
    from streamsoup.cli.guard import say
    from streamsoup.greedy_job import JOB_NAME

    folder = Path(args.resume) if args.resume else _workdir(args)
    if (folder / JOB_NAME).exists():
        say(f"Scores and decisions so far are kept in {folder}; go on with `streamsoup greedy --resume {folder}`.")


def _workdir(args: argparse.Namespace) -> Path:
    return Path(args.workdir or f"{str(args.output).rstrip('/')}.work")


def _forecast_folder(args: argparse.Namespace) -> Path:
    return _workdir(args) if args.output or args.workdir else Path("work")


def _remove_workdir(folder: Path) -> None:
    """Remove what we made; decisions and scores are in the soup's folder."""
    import shutil

    from streamsoup.greedy_job import work_paths

    for path in work_paths(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _job(args: argparse.Namespace) -> GreedyJob:
    from streamsoup.checkpoints import absolute_path, expand_paths, natural_order
    from streamsoup.greedy_options import make_job

    if not args.ingredients:
        raise UsageError("Name the checkpoints to choose from.")
    if not args.score and not args.dry_run:
        raise UsageError("Say how to score a checkpoint: --score COMMAND.")
    if not args.output and not args.dry_run:
        raise UsageError("Say where the soup goes: -o FOLDER.")
    paths = expand_paths(args.ingredients)
    if args.order != "given" and not args.as_given:
        paths = natural_order(paths)
    order, own_scores = _order(args.order, paths)
    options = {
        "order": order,
        "own_scores": own_scores and {absolute_path(path): score for path, score in own_scores.items()},
        "metric": args.metric,
        "also": tuple(args.also or ()),
        "minimize": args.minimize,
        "accept": args.accept,
        "tolerance": args.tolerance,
        "seed": args.seed,
        "max_ingredients": args.max_ingredients,
        "prune": args.prune,
        "rounds": args.rounds,
        "restarts": args.restarts,
        "dtype": args.dtype,
        "sums_dtype": args.sums_dtype,
        "sums": args.sums,
        "shard_bytes": args.shard_size,
        "buffers": args.buffers,
        **_making_options(args),
    }
    # Absolute, so that the run can be resumed from anywhere.
    return make_job(
        [absolute_path(path) for path in paths],
        args.output and os.path.abspath(args.output),
        score_command=args.score,
        before_command=args.before_score,
        options=options,
    )


def _order(text: str | None, paths: list[str]) -> tuple[str | None, dict[str, float] | None]:
    """Read ``--order``: a word, or a file of scores."""
    if text is None or text in ("score", "given", "random"):
        return text, None
    from streamsoup.own_scores import read_own_scores

    return "score", read_own_scores(text, paths)
