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
from streamsoup.cli.options import (
    add_dtype,
    add_naming_options,
    add_output_options,
    add_overwrite,
    add_running_options,
    naming_of,
)
from streamsoup.cli.pages import SOUP_FILES, add_command, add_showing_options, epilog
from streamsoup.cli.progress import make_progress
from streamsoup.units import parse_bytes

if TYPE_CHECKING:
    from streamsoup.greedy_job import GreedyJob

_DESCRIPTION = """\
Sort checkpoints by held-out score, and keep each one whose addition does not lower the soup's. A trial reads one
checkpoint and the running sum, whatever was kept before. Scores and decisions are kept as they come, so that an
interrupted run evaluates nothing twice."""
_COMMAND = """\
  The score is the last line that the command prints, or with --metric a key of JSON that it prints last (or writes to
  {result}). {soup} stands for a checkpoint folder (a file, where the ingredients are files), {soup_file} for its one
  .safetensors file. With --jobs several commands run at once; each finds its number, from 0 on, in STREAMSOUP_JOB, by
  which it may choose its device."""
_EXAMPLES = (
    ("Keep what helps", 'streamsoup greedy runs/* --score "python eval.py {soup}" -o soup/'),
    ("Decide by a key of JSON", 'streamsoup greedy runs/* --score "..." --metric accuracy -o soup/'),
    ("Begin with scores that are known", 'streamsoup greedy runs/* --score "..." --order scores.json -o soup/'),
    ("Start from all, and drop what does not help", 'streamsoup greedy runs/* --score "..." --prune -o soup/'),
    (
        "Score four at once, each on its own GPU",
        "streamsoup greedy runs/* -o soup/ --jobs 4 --score \\\n"
        "      'sh -c \"CUDA_VISIBLE_DEVICES=$STREAMSOUP_JOB exec python e.py $0\" {soup}'",
    ),
    ("Go on after an interruption", "streamsoup greedy --resume work/"),
)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "greedy",
        usage=("CHECKPOINT ... --score COMMAND -o OUT [option ...]", "--resume WORKDIR [option ...]"),
        purpose="average those checkpoints that help, by a held-out score",
        description=_DESCRIPTION,
        below=epilog(
            the_command=_COMMAND,
            files={
                **SOUP_FILES,
                "OUT/decisions.json": "what was tried, scored and kept",
                "OUT.work/": "scores, decisions and running sums (or --workdir): kept after a failure",
            },
            examples=_EXAMPLES,
        ),
    )
    parser.add_argument("ingredients", nargs="*", metavar="CHECKPOINT", help="as in `streamsoup soup`, without weights")
    parser.add_argument("-o", "--output", metavar="OUT", help="a new folder for the soup, or a .safetensors file")
    _add_scoring(parser.add_argument_group("scoring"))
    _add_rule(parser.add_argument_group("deciding"))
    how = parser.add_argument_group("how to make it")
    how.add_argument("--resume", metavar="WORKDIR", help="go on with the interrupted run of that work folder")
    how.add_argument("--workdir", metavar="DIR", help="for scores and sums (default: OUT.work, removed at the end)")
    how.add_argument("--candidates", metavar="DIR", help="for candidates, such as a RAM disk (default: in the workdir)")
    add_dtype(how)
    how.add_argument("--sums-dtype", choices=("float64", "float32"), help="of running sums (default: float64)")
    how.add_argument(
        "--sums",
        choices=("auto", "device", "host", "disk"),
        help="where running sums are kept (default: auto, by room)",
    )
    add_output_options(how)
    add_naming_options(how)
    add_running_options(how)
    add_overwrite(how)
    show = parser.add_argument_group("what to show")
    show.add_argument("--plot", metavar="FILE", help="draw the run as PNG, SVG or PDF")
    show.add_argument("--dry-run", action="store_true", help="print what it will need, and score nothing")
    add_showing_options(show)
    parser.set_defaults(run=run, guarded=True, on_death=after_death)


def _add_scoring(group: Any) -> None:
    group.add_argument("--score", metavar="COMMAND", help="command that scores a checkpoint")
    group.add_argument(
        "--metric",
        metavar="KEY",
        help="key (dotted path) of the JSON that decides (default: the last line is the score)",
    )
    group.add_argument(
        "--also", metavar="KEY", action="append", help="further key to record; may be repeated (default: none)"
    )
    group.add_argument("--minimize", action="store_true", help="a lower score is better")
    group.add_argument(
        "--score-timeout",
        type=float,
        metavar="SECONDS",
        help="longest that one evaluation may take (default: no limit)",
    )
    group.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="score the next N candidates at once, with the same decisions; a command finds 0 to N-1 in STREAMSOUP_JOB "
        "(default: 1)",
    )
    group.add_argument(
        "--before-score",
        metavar="COMMAND",
        help="run on each candidate first, such as for BatchNorm statistics (default: none)",
    )


def _add_rule(group: Any) -> None:
    group.add_argument(
        "--accept",
        choices=("ge", "gt"),
        help="keep what does not lower the score, or only what raises it (default: ge)",
    )
    group.add_argument(
        "--tolerance", type=float, metavar="X", help="how far below still counts as not lower (default: 0)"
    )
    group.add_argument(
        "--order",
        metavar="HOW",
        help="try them by score, as given, at random, or by a JSON or CSV file with their own scores (default: score)",
    )
    group.add_argument("--as-given", action="store_true", help="take equal scores in the order of the arguments")
    group.add_argument("--seed", type=int, metavar="N", help="of a random order (default: 0)")
    group.add_argument("--max-ingredients", type=int, metavar="N", help="most that may be kept (default: all)")
    group.add_argument("--prune", action="store_true", help="start from all, and drop what does not help")
    group.add_argument(
        "--rounds", type=int, metavar="N", help="go through the list so often; one may enter again (default: 1)"
    )
    group.add_argument(
        "--restarts", type=int, metavar="N", help="further runs in random order; the best wins (default: 0)"
    )


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
        **naming_of(args),
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
