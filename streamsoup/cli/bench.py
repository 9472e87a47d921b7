"""``streamsoup bench``: ceilings of this machine, and the engine against them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamsoup.cli.guard import UsageError
from streamsoup.cli.pages import add_command, epilog
from streamsoup.units import format_binary, format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from streamsoup.bench import BenchReport
    from streamsoup.bench.report import DeviceFigures, EngineFigures

_DESCRIPTION = """\
Measure what memory, page cache and disk give at best, then average checkpoints and say which of these ceilings the
engine met, and how closely. Rates are in 10^9 bytes a second."""
_EXAMPLES = (
    ("Ceilings, and eight small ViTs", "streamsoup bench"),
    ("Larger ones from a cold disk", "streamsoup bench --preset vit-g --cold --dir /scratch --plot bench.png"),
    ("Checkpoints of your own, which are only read", "streamsoup bench --ingredients-from runs/*"),
)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "bench",
        usage=("[option ...]", "--ingredients-from CHECKPOINT ... [option ...]"),
        purpose="measure this machine's memory and disk, and the engine against them",
        description=_DESCRIPTION,
        below=epilog(
            files={"DIR/": "of --dir: checkpoints are made in a folder there, which is removed at the end"},
            examples=_EXAMPLES,
        ),
    )
    what = parser.add_argument_group("what to average")
    what.add_argument(
        "--preset", metavar="NAME", help="vit-b32, vit-l14, vit-g, llama-7b or moe-many-tensors (default: vit-b32)"
    )
    what.add_argument("--ingredients", type=int, metavar="N", help="how many checkpoints to make (default: 8)")
    what.add_argument("--dtype", choices=("bf16", "f16", "f32"), help="their dtype (default: bf16)")
    what.add_argument(
        "--ingredients-from", nargs="+", metavar="CHECKPOINT", help="checkpoints of your own, instead of made ones"
    )
    how = parser.add_argument_group("how to measure")
    how.add_argument("--cold", action="store_true", help="drop the checkpoints from the page cache before each run")
    how.add_argument("--dir", metavar="DIR", help="where files are made (default: the system's temporary folder)")
    how.add_argument("--repeats", type=int, metavar="N", help="measurements of each figure (default: 5, the least)")
    how.add_argument(
        "--budget", metavar="SIZE", help="memory to own (default: a quarter of what is free, at most 2GiB)"
    )
    how.add_argument(
        "--device",
        metavar="DEVICE",
        help="as in `streamsoup soup`; copies to and from it are measured, too (default: cpu)",
    )
    how.add_argument(
        "--device-budget", metavar="SIZE", help="memory of each GPU to use (default: half of what is free there)"
    )
    how.add_argument("--threads", type=int, metavar="N", help="worker threads (default: the cores)")
    show = parser.add_argument_group("what to show")
    show.add_argument("--json", metavar="FILE", help="write all figures; - prints them instead of the table")
    show.add_argument("--plot", metavar="FILE", help="draw them as PNG, SVG or PDF")
    show.add_argument("--quiet", action="store_true", help="show no progress")
    show.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.set_defaults(run=run, guarded=True)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from streamsoup.bench import BenchOptions, run_bench

    if args.plot:
        from streamsoup.picture import require_picture

        require_picture(args.plot)
    if args.json and args.json != "-" and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no folder {Path(args.json).absolute().parent}.")
    with _Steps(quiet=args.quiet) as step:
        report = run_bench(BenchOptions(**_options(args)), step=step)
    if args.plot:
        from streamsoup.bench.picture import draw_bench

        draw_bench(report, args.plot)
    document = json.dumps(report.to_json(), indent=1) if args.json else ""
    if args.json == "-":
        print(document)
        return 0
    if args.json:
        Path(args.json).write_text(document + "\n", encoding="utf-8")
    _print_report(report)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Turn arguments into options; those that were not given keep their defaults."""
    options: dict[str, Any] = {
        "preset": args.preset,
        "ingredients": args.ingredients,
        "dtype": args.dtype,
        "cold": args.cold or None,
        "folder": args.dir,
        "repeats": args.repeats,
        "budget_bytes": args.budget and parse_bytes(args.budget),
        "device": args.device,
        "device_budget_bytes": args.device_budget and parse_bytes(args.device_budget),
        "workers": args.threads,
    }
    if args.ingredients_from:
        from streamsoup.checkpoints import expand_paths, natural_order

        if more := [name for name in ("preset", "ingredients", "dtype") if options[name] is not None]:
            raise UsageError(f"--{more[0]} makes checkpoints; give it or --ingredients-from.")
        options["paths"] = tuple(natural_order(expand_paths(args.ingredients_from)))
    return {name: value for name, value in options.items() if value is not None}


class _Steps:
    """Says what is being measured: on one line of a terminal, else on a line each."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._quiet:
            return
        if self._live:
            print(f"\r\x1b[2K{text} ...", end="", file=sys.stderr, flush=True)
        else:
            print(f"{text} ...", file=sys.stderr, flush=True)

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live and not self._quiet:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _print_report(report: BenchReport) -> None:
    machine, engine = report.machine, report.engine
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {format_binary(machine['memory_bytes'])}, "
        f"load {machine['load_average']:.1f} before and {report.load_average_after:.1f} after"
    )
    print(f"\n{'ceilings':<24} {'GB/s':>7}  {'least - most':<15} how")
    for ceiling in report.ceilings:
        rate = ceiling.gb_per_s
        span = f"{rate.least:.2f} - {rate.most:.2f}"
        print(f"  {ceiling.name:<22} {rate.median:>7.2f}  {span:<15} {ceiling.how}")
    for text in report.skipped:
        print(f"  not measured: {text}")
    rate, seconds, floor = engine.gb_per_s, engine.seconds, engine.floor_seconds
    print(f"\n{'the engine':<24} {'GB/s':>7}  {'least - most':<15} {engine.what}, {engine.cache.split(':')[0]}")
    span = f"{rate.least:.2f} - {rate.most:.2f}"
    print(
        f"  {'ingredients':<22} {rate.median:>7.2f}  {span:<15} {format_bytes(engine.input_bytes)} in "
        f"{format_seconds(seconds.median)} ({seconds.least:.2f} - {seconds.most:.2f} s), read mode {engine.read_mode}"
    )
    print(f"  {'memory, modelled':<22} {engine.dram_gb_per_s:>7.2f}")
    for stage in engine.stages:
        if stage.gb_per_s is None:
            continue
        share = "" if stage.share is None else f"{stage.share:.0%} of {stage.ceiling}"
        mark = "  <- limits the run" if stage.name == engine.limited_by else ""
        print(f"  {stage.name:<22} {stage.gb_per_s:>7.2f}  {stage.seconds:.2f} s{'':<9} {share}{mark}")
    ratio = seconds.median / floor.median
    print(
        f"  {'floor':<22} {engine.input_bytes / floor.median / 1e9:>7.2f}  {floor.median:.2f} s{'':<9} "
        f"{engine.floor_how}; the engine took {ratio:.2f} of that time"
    )
    if report.device is not None:
        _print_device(report.device, engine)
    print(
        f"\n{engine.cache}\npeak memory {format_binary(engine.peak_bytes)} (projected "
        f"{format_binary(engine.projected_peak_bytes)}, budget {format_binary(engine.budget_bytes)}); wrote "
        f"{format_bytes(engine.output_bytes)}, result {engine.result_hash}"
    )


def _print_device(device: DeviceFigures, engine: EngineFigures) -> None:
    """Print what devices were made use of, and what that should be."""
    trial, target = device.trial_gb_per_s, device.host_to_device_target
    wanted = "" if target is None else f" (target: {target:.0%} at least)"
    print(f"\n{'on ' + engine.device:<24} {'GB/s':>7}  {'least - most':<15}")
    rate = engine.gb_per_s
    for name, spread, share in (
        ("ingredients", rate, f"{device.host_to_device_share:.0%} of host to device{wanted}"),
        ("greedy trial, resident", trial, f"{device.trial_share:.0%} of device memory"),
    ):
        span = f"{spread.least:.2f} - {spread.most:.2f}"
        print(f"  {name:<22} {spread.median:>7.2f}  {span:<15} {share}")
