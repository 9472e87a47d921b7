"""``streamsoup completion``: scripts by which shells complete the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from streamsoup.cli.pages import add_command, epilog

_SHELLS = ("bash", "zsh", "fish")
_DESCRIPTION = """\
Print a script by which a shell completes commands, options, their values and paths. It knows the options of this
version: make it anew after an update. It is written by shtab, which must be installed: pip install
'streamsoup[completion]'."""
_EXAMPLES = (
    ("Complete in this bash, or in all from ~/.bashrc", 'eval "$(streamsoup completion bash)"'),
    ("In zsh, for a folder in $fpath", "streamsoup completion zsh > ~/.zfunc/_streamsoup"),
    ("In fish", "streamsoup completion fish > ~/.config/fish/completions/streamsoup.fish"),
)
_FILES = {"CHECKPOINT[:WEIGHT]", "CHECKPOINT", "CONFIG", "FILE", "OUT", "SOUP", "SOURCE"}
_FOLDERS = {"DIR", "WORKDIR"}


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "completion",
        usage=("SHELL",),
        purpose="print a script by which a shell completes the command line",
        description=_DESCRIPTION,
        below=epilog(examples=_EXAMPLES),
    )
    parser.add_argument("shell", choices=_SHELLS, metavar="SHELL", help=", ".join(_SHELLS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from streamsoup.cli import build_parser
    from streamsoup.errors import StreamsoupError

    try:
        import shtab
    except ModuleNotFoundError:
        raise StreamsoupError("Completion needs shtab: pip install 'streamsoup[completion]'.") from None
    parser = build_parser()
    for action in _actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action._choices_actions:
                action.choices[command.dest].description = command.help  # shells show it in one line
                yield from _actions(action.choices[command.dest])
        else:
            yield action
