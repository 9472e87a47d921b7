"""Options that several subcommands have."""

from __future__ import annotations

import argparse
from typing import Any


def add_output_options(group: Any) -> None:
    """Add what every recipe may say beside its method."""
    group.add_argument("--shard-size", metavar="SIZE", help="largest output file (default: 5GB)")
    group.add_argument(
        "--buffers",
        choices=("identical", "first"),
        help="non-float tensors that differ: refuse (default), or take the first checkpoint's",
    )
    group.add_argument(
        "--nonfinite",
        choices=("error", "warn", "allow"),
        help="NaN or infinity in a checkpoint (default: error)",
    )


def add_running_options(group: Any) -> None:
    """Add what says how bytes are read and worked on; None where it is not given."""
    group.add_argument(
        "--budget", metavar="SIZE", help="memory to own (default: a quarter of what is free, at most 2GiB)"
    )
    group.add_argument("--device", help="cpu, cuda, cuda:N, several as in cuda:0,cuda:1, or all (default: cpu)")
    group.add_argument(
        "--device-budget", metavar="SIZE", help="memory of each GPU to use (default: half of what is free there)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="worker threads (default: by cores and disk)")
    group.add_argument(
        "--read",
        choices=("auto", "map", "ahead", "plain", "gds"),
        help="map files, or read them plainly (default: map what is local, ahead where it is not cached)",
    )


def add_execution_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that change no bit of a result."""
    how = parser.add_argument_group("how to make it (changes no bit of the result)")
    add_running_options(how)
    how.add_argument("--overwrite", action="store_true", help="replace a soup that exists")
    how.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of torchrun's processes, though a script between them started it",
    )
    how.add_argument("--restart", action="store_true", help="throw away unfinished work of an earlier run")
    how.add_argument(
        "--no-sync", action="store_true", help="do not wait for the disk: a crash of the machine may damage the soup"
    )
    how.add_argument("--no-keep", action="store_true", help="leave nothing behind after a failure")
    show = parser.add_argument_group("what to show")
    show.add_argument("--json", action="store_true", help="print the result as JSON")
    show.add_argument("--quiet", action="store_true", help="print nothing but errors")
    show.add_argument("--debug", action="store_true", help="show a traceback with an error")
