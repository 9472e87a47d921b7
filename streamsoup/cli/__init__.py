"""The command line: parsing, printing and progress live here and nowhere else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from streamsoup._version import __version__
from streamsoup.cli import guard
from streamsoup.cli.pages import PageFormatter

_SHARED = ("soup", "mergekit", "convert")  # what several ranks do together
_COMMANDS = ("soup", "mergekit", "greedy", "learn", "inspect", "convert", "verify", "bench", "completion")
_DESCRIPTION = """\
Average the weights of many fine-tuned checkpoints of one network into one (a model soup), tile by tile, in memory that
depends on neither their number nor their size."""


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of all subcommands, or of one: importing the others takes 0.03 s."""
    parser = argparse.ArgumentParser(
        prog="streamsoup",
        description=_DESCRIPTION,
        epilog="Run `streamsoup COMMAND --help` for the page of a command.",
        formatter_class=PageFormatter,
    )
    parser.add_argument("--version", action="version", version=f"streamsoup {__version__}")
    parser.set_defaults(rank=None)  # of several processes; see `main`
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in (only,) if only in _COMMANDS else _COMMANDS:
        import_module(f"streamsoup.cli.{name}").add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 an error, 2 wrong usage, 130 Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = build_parser(given[0] if given else None)
    if not given:
        parser.print_help()
        return 2
    args = parser.parse_args(given)
    if getattr(args, "quiet", False):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    args.rank = _rank(insisted=getattr(args, "distributed", False))
    if args.rank is not None:
        guard.speak_as(args.rank)
        if args.command not in _SHARED:
            if args.rank == 0:
                guard.say(f"`{args.command}` runs in one process. Start it without torchrun.")
            else:
                guard.leave_the_word()
            return 2
    return guard.run_command(args)


def _rank(*, insisted: bool) -> int | None:
    """Which of torchrun's processes this is, if it is one."""
    if insisted:
        return int(os.environ.get("RANK") or 0)
    if "WORLD_SIZE" not in os.environ:
        return None
    from streamsoup.ranks import is_rank

    return int(os.environ["RANK"]) if is_rank() else None
