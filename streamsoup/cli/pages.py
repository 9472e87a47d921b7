"""How help is laid out: like a page of a manual, in the width of the terminal."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

_MOST_COLUMNS = 100  # longer lines are hard to read
_FILLED = (0, 2, 8)
EXIT_STATUS = {
    "0": "done",
    "1": "an error, which one line on standard error tells",
    "2": "wrong usage",
    "130": "interrupted by Ctrl-C (143: terminated, 137: killed)",
}


SOUP_FILES = {
    "OUT/*.safetensors": "the soup; with an index if there are several",
    "OUT/streamsoup.json": "the manifest: what the checkpoints were, their content digests, notes",
    "OUT/recipe.yaml": "the recipe, which makes the same soup again",
    "OUT/README.md, OUT/config.json ...": "a model card; configuration and tokenizer of the first checkpoint",
}


class PageFormatter(argparse.HelpFormatter):
    """Fills descriptions and epilogs, paragraph by paragraph.

    Lines that are not indented, or by 2 or 8 spaces, are filled together with their neighbours of the same indent;
    lines with any other indent stay as they are.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        columns = min(shutil.get_terminal_size().columns, _MOST_COLUMNS)
        super().__init__(prog, **{"max_help_position": 26, "width": columns - 2, **options})
        self._action_max_length = 14  # argparse forgets that commands are indented: the longest had a line of its own

    def _split_lines(self, text: str, width: int) -> list[str]:
        import textwrap

        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        import textwrap

        filled = []
        for space, lines in groupby(text.splitlines(), lambda line: len(line) - len(line.lstrip())):
            if space not in _FILLED:
                filled += list(lines)
                continue
            for blank, paragraph in groupby(lines, lambda line: not line.strip()):
                margin = indent + " " * space
                joined = " ".join(line.strip() for line in paragraph)
                filled += (
                    [""]
                    if blank
                    else textwrap.wrap(
                        joined, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
                    )
                )
        return "\n".join(filled)


def epilog(
    *,
    examples: Sequence[tuple[str, str]],
    exit_status: Mapping[str, str] = EXIT_STATUS,
    files: Mapping[str, str] | None = None,
    **sections: str,
) -> str:
    """Write what stands below the options.

    Parameters
    ----------
    examples : sequence of (what, command)
    exit_status : mapping of code to meaning
    files : mapping of path to what it holds
    **sections : str
        Further sections by name, which come first; in the layout of `PageFormatter`.
    """
    parts = [f"{name.upper().replace('_', ' ')}\n{text.rstrip()}" for name, text in sections.items()]
    parts.append("EXIT STATUS\n" + "\n".join(f"    {code:<4} {meaning}" for code, meaning in exit_status.items()))
    if files:
        parts.append("FILES\n" + "\n".join(f"  {path}\n        {what}" for path, what in files.items()))
    parts.append("EXAMPLES\n" + "\n".join(f"  {what}:\n    {command}" for what, command in examples))
    return "\n\n".join(parts)


def add_command(
    commands: Any, name: str, *, usage: Sequence[str], purpose: str, description: str, below: str
) -> argparse.ArgumentParser:
    """Add a subcommand with its page.

    Parameters
    ----------
    commands : argparse subparsers
    name : str
    usage : sequence of str
        The ways to call it, without the name of the program.
    purpose : str
        One line, for the list of commands.
    description : str
        A paragraph.
    below : str
        See `epilog`.
    """
    lines = [f"streamsoup {name} {way}" for way in usage]
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        usage="\n       ".join(lines).replace("%", "%%"),
        description=description,
        epilog=below,
        formatter_class=PageFormatter,
    )
    return parser


def add_showing_options(group: Any, *, quiet: str = "print nothing but errors, and show no progress") -> None:
    """Add the options that say what is printed; `quiet`: what that does."""
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("--quiet", action="store_true", help=quiet)
    group.add_argument("--debug", action="store_true", help="show a traceback with an error")
