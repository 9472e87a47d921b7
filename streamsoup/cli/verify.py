"""``streamsoup verify``: is a soup what its recipe makes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from streamsoup.cli.options import add_running_options
from streamsoup.cli.pages import EXIT_STATUS, add_command, add_showing_options, epilog
from streamsoup.units import format_binary, format_bytes, format_seconds

if TYPE_CHECKING:
    from streamsoup.verifying import Mismatch, Verification

_DESCRIPTION = """\
Make a soup again from the recipe that lies in it, all of it or a sample spread over all tensors, and compare it bit for
bit with what is there. Before that the soup's files are compared with its manifest, and its checkpoints with what they
were. Nothing is written. Where a method measures tensors, the sample consists of whole ones."""
_EXAMPLES = (
    ("Compare 64 MiB, spread over all tensors", "streamsoup verify soup/"),
    ("Compare all, and the content digests of the checkpoints", "streamsoup verify soup/ --all"),
    ("Compare with checkpoints that were moved", "streamsoup verify soup/ --ingredients /new/runs/*"),
)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "verify",
        usage=("SOUP [option ...]",),
        purpose="make a soup again, or a sample of it, and compare bit for bit",
        description=_DESCRIPTION,
        below=epilog(
            exit_status={
                **EXIT_STATUS,
                "0": "the same, as far as it was compared",
                "1": "not the same, checkpoints or files that changed, or an error",
            },
            files={
                "SOUP/streamsoup.json, SOUP/recipe.yaml": "what it was made of, and how",
                "NAME.streamsoup.json, NAME.recipe.yaml": "the same beside a single file NAME.safetensors",
            },
            examples=_EXAMPLES,
        ),
    )
    parser.add_argument("soup", metavar="SOUP", help="a soup folder, or a .safetensors file with its files beside it")
    what = parser.add_argument_group("what to compare")
    what.add_argument("--all", action="store_true", help="compare all elements (default: a sample)")
    what.add_argument("--sample", metavar="SIZE", help="bytes of the soup to compare (default: 64MiB)")
    what.add_argument("--seed", type=int, metavar="N", help="decides which elements are in the sample (default: 0)")
    what.add_argument(
        "--ingredients",
        nargs="+",
        metavar="CHECKPOINT",
        help="where the soup's checkpoints are now, in the recipe's order, the base first (default: where they were)",
    )
    add_running_options(parser.add_argument_group("how to make it (changes no bit of the result)"))
    show = parser.add_argument_group("what to show")
    add_showing_options(show, quiet="print nothing unless something is wrong, and show no progress")
    parser.set_defaults(run=run, guarded=True)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from streamsoup.cli.guard import UsageError
    from streamsoup.cli.progress import make_progress

    if args.all and (args.sample or args.seed is not None):
        raise UsageError("--all compares everything; --sample and --seed choose some. Give one of them.")
    # numba looks for scipy, whose import takes as long as numba's own. This process is ours, and needs none.
    sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]
    from streamsoup.verifying import verify

    with make_progress(quiet=args.quiet or args.json, verb="comparing") as progress:
        found = verify(
            args.soup,
            ingredients=args.ingredients,
            sample=None if args.all else args.sample or "64MiB",
            seed=args.seed or 0,
            budget_bytes=args.budget,
            device=args.device or "cpu",
            device_budget_bytes=args.device_budget,
            workers=args.threads,
            read_mode=args.read or "auto",
            progress=progress,
            on_compile=progress.compiling,
        )
    if args.json:
        print(json.dumps(_document(found)))
    elif not args.quiet or not found.is_same:
        print("\n".join(_report(found)))
    return 0 if found.is_same else 1


def _document(found: Verification) -> dict[str, Any]:
    first = found.first
    return {
        **dataclasses.asdict(found),
        "path": str(found.path),
        "is_same": found.is_same,
        "share": found.share,
        "first": first
        and {
            "tensor": first.tensor,
            "element": first.element,
            "index": list(first.index),
            "dtype": first.dtype.name,
            "expected": {"bits": _bits(first.expected), "value": _value(first, first.expected)},
            "found": {"bits": _bits(first.found), "value": _value(first, first.found)},
            "file": first.file,
        },
    }


def _report(found: Verification) -> list[str]:
    from streamsoup.cli.guard import printable

    rows = [("problem", problem) for problem in found.problems]
    if found.tiles:
        known = (
            "content digests, where the manifest has them,"
            if found.whole
            else "sizes, headers and samples (--all: content digests)"
        )
        rows = [
            ("ingredients", f"{found.ingredients}, known by their {known}"),
            (
                "compared",
                f"{format_bytes(found.bytes_compared)} of {format_bytes(found.bytes_total)} ({_percent(found.share)}), "
                f"{found.tiles:,} tile(s) of {found.tensors_compared:,} of {found.tensors:,} tensors",
            ),
            (
                "cost",
                f"read {format_bytes(found.bytes_read)} of ingredients in {format_seconds(found.seconds)}, peak memory "
                f"{format_binary(found.measured_peak_bytes)}",
            ),
            *rows,
        ]
    rows += [("note", note) for note in found.notes]
    if found.first is not None:
        rows.append(("first", _first(found.first)))
    rows.append(("verdict", _verdict(found)))
    head = f"{found.path}: {found.method}, made of {found.ingredients} checkpoint{'s' * (found.ingredients != 1)}"
    return [printable(head), *(f"  {label:<12} {printable(text)}" for label, text in rows)]


def _verdict(found: Verification) -> str:
    if found.differing:
        return f"differs: {found.differing:,} element(s) of those compared are not what the recipe makes"
    if found.problems:
        return "not as it was made" if found.tiles else "cannot be compared"
    return "the same, bit for bit" if found.whole else "the same, bit for bit, as far as it was compared"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.1g} of it"


def _first(first: Mismatch) -> str:
    place = f"{first.tensor}{list(first.index)}" if first.index else first.tensor
    expected, found = (
        f"{_value(first, bits)} ({_bits(bits)})".removeprefix("None ") for bits in (first.expected, first.found)
    )
    return f"{place}, element {first.element:,}: {first.dtype.name} {expected} expected, {found} found in {first.file}"


def _bits(bits: bytes) -> str:
    return f"0x{int.from_bytes(bits, 'little'):0{2 * len(bits)}x}"


def _value(first: Mismatch, bits: bytes) -> str | None:
    """The number that bits stand for; None where torch has no such dtype."""
    if not first.dtype.torch_name:
        return None
    import torch

    return str(torch.frombuffer(bytearray(bits), dtype=getattr(torch, first.dtype.torch_name))[0].item())
