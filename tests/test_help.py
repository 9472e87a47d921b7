"""Help reads like a page of a manual: complete, in the width of the terminal, with examples that parse."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

from streamsoup.cli import _COMMANDS, build_parser

WRITES = {"soup", "mergekit", "greedy", "learn", "convert"}
# Options with a value that mean nothing unless they are given.
NOTHING_UNLESS_GIVEN = {
    *("--output", "--recipe", "--resume", "--base", "--parameter", "--importance", "--sweep", "--score", "--task"),
    *("--html", "--plot", "--json", "--ingredients-from"),
}


def pages():
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands


def page(name, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    return pages().choices[name].format_help()


def options_of(name):
    return [a for a in pages().choices[name]._actions if a.option_strings]


@pytest.mark.parametrize("columns", [80, 100, 160])
@pytest.mark.parametrize("name", _COMMANDS)
def test_it_fits_the_terminal_and_a_hundred_columns(name, monkeypatch, columns):
    lines = page(name, monkeypatch, columns).splitlines()
    assert max(map(len, lines)) <= min(columns, 100), max(lines, key=len)
    assert max(map(len, lines)) > min(columns, 100) - 20, "text is filled to the width"
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("name", _COMMANDS)
def test_it_has_all_sections_in_one_order(name, monkeypatch):
    text = page(name, monkeypatch, 100)
    heads = re.findall(r"^(usage|EXIT STATUS|FILES|EXAMPLES)\b", text, re.MULTILINE)
    assert heads in (["usage", "EXIT STATUS", "FILES", "EXAMPLES"], ["usage", "EXIT STATUS", "EXAMPLES"])
    assert ("FILES" in heads) or name not in WRITES
    for code in ("0", "1", "2", "130"):
        assert re.search(rf"^    {code} +\w", text, re.MULTILINE)
    assert text.startswith(f"usage: streamsoup {name} ")


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_argument_has_help_and_a_group(name):
    for action in pages().choices[name]._actions:
        assert action.help, action.dest
        assert not action.help.endswith("."), action.dest
        assert action.metavar or action.choices or action.nargs == 0, f"{action.dest}: what kind of value"
    general = {a.dest for a in pages().choices[name]._optionals._group_actions}
    assert general <= {"help", "output", "task"}, "options have groups with names"


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_option_with_a_value_says_its_default(name):
    for action in options_of(name):
        long = action.option_strings[-1]
        if action.nargs != 0 and long not in NOTHING_UNLESS_GIVEN:
            assert "default" in action.help, long
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert f"default: {action.default}" in action.help, long


def test_an_option_says_the_same_wherever_it_is():
    said = {}
    for name in _COMMANDS:
        for action in options_of(name):
            said.setdefault(action.option_strings[-1], {}).setdefault(action.help, []).append(name)
    for option in ("--budget", "--device-budget", "--shard-size", "--overwrite", "--buffers", "--minimize", "--debug"):
        texts = {text for text, names in said[option].items() if names != ["bench"]}
        assert len(texts) == 1, (option, texts)


@pytest.mark.parametrize("name", _COMMANDS)
def test_examples_are_commands_that_parse(name, monkeypatch):
    examples = page(name, monkeypatch, 100).split("\nEXAMPLES\n")[1].replace("\\\n", "")
    commands = re.findall(r"^    (streamsoup .*)$", examples, re.MULTILINE)
    commands += re.findall(r'\$\((streamsoup .*)\)"$', examples, re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(command.split(" > ")[0])
        args = build_parser().parse_args(words[1:])
        assert args.command in (name, "soup"), command  # what mergekit began goes on as a soup


def test_every_command_is_listed_and_told_of_in_the_readme(cli):
    from pathlib import Path

    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    text = cli("--help").stdout
    for entry in pages()._choices_actions:
        assert f"    {entry.dest} " in text
        assert f"streamsoup {entry.dest}" in readme
    assert [entry.dest for entry in pages()._choices_actions] == list(_COMMANDS)
