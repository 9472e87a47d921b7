"""Options that several subcommands have."""

from __future__ import annotations

import argparse
from typing import Any

from streamsoup.cli.pages import add_showing_options


def add_output_options(group: Any) -> None:
    """Add what every recipe may say beside its method."""
    add_shard_size(group)
    group.add_argument(
        "--buffers",
        choices=("identical", "first"),
        help="non-float tensors that differ: refuse them, or take the first checkpoint's (default: identical)",
    )
    group.add_argument(
        "--nonfinite",
        choices=("error", "warn", "allow"),
        help="NaN or infinity in a checkpoint: refuse, note or say nothing (default: error)",
    )


def add_shard_size(group: Any) -> None:
    """Add the size of output files."""
    group.add_argument("--shard-size", metavar="SIZE", help="largest output file, such as 500MB (default: 5GB)")


def add_dtype(group: Any) -> None:
    """Add the dtype of a soup."""
    group.add_argument(
        "--dtype", metavar="DTYPE", help="float dtype of the soup, such as bfloat16 (default: the first checkpoint's)"
    )


def add_accumulate(group: Any) -> None:
    """Add in what sums are kept."""
    group.add_argument(
        "--accumulate",
        choices=("float64", "float32"),
        help="in what sums are kept; float32 is less exact, for GPUs that are slow in float64 (default: float64)",
    )


def add_quantize(group: Any) -> None:
    """Add writing with scales."""
    group.add_argument(
        "--quantize",
        choices=("fp8-block",),
        help="of one checkpoint, such as a soup: write its linear weights as 8-bit floats with scales in blocks of "
        "128x128 (default: not)",
    )


def add_naming_options(group: Any) -> None:
    """Add what says how tensors are named and found; None where it is not given."""
    group.add_argument(
        "--strip-prefix",
        action="append",
        metavar="PREFIX",
        help="take this off the beginning of tensor names that have it, such as module.; may be repeated (default: "
        "none)",
    )
    group.add_argument(
        "--rename",
        action="append",
        metavar="OLD=NEW",
        help="replace what matches the regular expression OLD in tensor names (NEW follows the last =, with \\1 for a "
        "group); may be repeated, in order (default: none)",
    )
    group.add_argument(
        "--key",
        metavar="NAME",
        help="entry of nested torch files that holds the tensors (default: the only one that can be meant)",
    )
    group.add_argument(
        "--only-shared",
        action="store_true",
        default=None,
        help="take the tensors that all checkpoints have with one shape, and list all others",
    )


def naming_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was given of `add_naming_options`, by the names that it has in Python; None where it was not."""
    from streamsoup.cli.guard import UsageError

    pairs = None if args.rename is None else [text.rpartition("=") for text in args.rename]
    for (old, equals, _), text in zip(pairs or (), args.rename or (), strict=True):
        if not old or not equals:
            raise UsageError(f"--rename {text}: write it as OLD=NEW.")
    return {
        "strip_prefix": args.strip_prefix and tuple(args.strip_prefix),
        "rename": pairs and tuple((old, new) for old, _, new in pairs),
        "key": args.key,
        "only_shared": args.only_shared,
    }


def add_running_options(group: Any) -> None:
    """Add what says how bytes are read and worked on; None where it is not given."""
    group.add_argument(
        "--budget",
        metavar="SIZE",
        help="memory to own, such as 512MiB (default: a quarter of what is free, at most 2GiB)",
    )
    group.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:N, several as in cuda:0,cuda:1, or all (default: cpu)"
    )
    group.add_argument(
        "--device-budget",
        metavar="SIZE",
        help="memory of each GPU to use, such as 4GiB (default: half of what is free there)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="worker threads (default: by cores and disk)")
    group.add_argument(
        "--read",
        choices=("auto", "map", "ahead", "plain", "gds"),
        help="map files, read maps ahead, read plainly, or from storage to a GPU (default: auto, which maps what is "
        "local, and reads ahead what is not cached)",
    )


def add_overwrite(group: Any) -> None:
    """Add leave to replace a soup."""
    group.add_argument("--overwrite", action="store_true", help="replace a soup (or conversion) that exists")


def add_execution_options(parser: argparse.ArgumentParser, *, resumes: bool = True) -> None:
    """Add the options that change no bit of a result."""
    how = parser.add_argument_group("how to make it (changes no bit of the result)")
    add_running_options(how)
    add_overwrite(how)
    if resumes:
        how.add_argument("--resume", metavar="OUT", help="go on with what was interrupted on its way to OUT")
    how.add_argument("--restart", action="store_true", help="throw away unfinished work of an earlier run")
    how.add_argument("--no-keep", action="store_true", help="leave nothing behind after a failure")
    how.add_argument(
        "--no-sync", action="store_true", help="do not wait for the disk: a crash of the machine may damage the result"
    )
    how.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of torchrun's processes, though a script between them started it",
    )
    show = parser.add_argument_group("what to show")
    show.add_argument("--dry-run", action="store_true", help="print the plan, and read nothing but headers")
    add_showing_options(show)
