"""Runs a command so that whatever ends it ends in one plain line.

A mapped file that shrinks or whose disk fails is a SIGBUS, which no Python code can catch. So a command that reads
checkpoints runs in a child process, forked before anything heavy is imported (about a millisecond), and the parent
says what happened if a signal ends the child.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from streamsoup.errors import RankError, StreamsoupError

_PR_SET_PDEATHSIG = 1
_SAME_CTRL_C_SECONDS = 0.5
_RANK_0_SPEAKS_SECONDS = 3.0


class UsageError(StreamsoupError):
    """The command line does not say what is needed."""


Command = Callable[[argparse.Namespace], int]


def run_command(args: argparse.Namespace) -> int:
    """Run `args.run(args)`; in a child process if `args.guarded`, which is given `args.on_death(args)`."""
    if not getattr(args, "guarded", False) or not hasattr(os, "fork"):
        return _run(args)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _become_child(parent)
        code = _run(args)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        # Not sys.exit: the interpreter's clean-up would unmap and free what the kernel frees faster.
        os._exit(code)
    return _wait(child, args)


def _become_child(parent: int) -> None:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    last = [-_SAME_CTRL_C_SECONDS]

    def interrupt(number: int, frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to both processes, and the parent passes it on: take it once.
        now = time.monotonic()
        if now - last[0] >= _SAME_CTRL_C_SECONDS:
            last[0] = now
            raise KeyboardInterrupt

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)


def _wait(child: int, args: argparse.Namespace) -> int:
    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGTERM, forward)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    say(_obituary(number))
    on_death: Any = getattr(args, "on_death", None)
    if on_death is not None:
        with contextlib.suppress(StreamsoupError, OSError):  # one line was said; a second matters less
            on_death(args)
    return 128 + number if number == signal.SIGKILL else 1


def _obituary(number: int) -> str:
    if number == signal.SIGBUS:
        return (
            "An ingredient shrank, vanished or could not be read while it was mapped (SIGBUS). Check the files and "
            "their disk, or use --read plain."
        )
    if number == signal.SIGKILL:
        return "The run was killed (SIGKILL), perhaps because the machine ran out of memory."
    return f"The run was ended by a signal ({signal.Signals(number).name})."


_speaker = ["streamsoup"]


def speak_as(rank: int) -> None:
    """Say from now on which of several processes speaks; the first is the one that is expected to."""
    _speaker[0] = f"streamsoup (rank {rank})" if rank else "streamsoup"


def say(text: str) -> None:
    """Print one line for the person on standard error."""
    print(f"{_speaker[0]}: {printable(text)}", file=sys.stderr)


def leave_the_word() -> None:
    """Give rank 0 the time to say why all ranks end: torchrun ends the others as soon as one of them has ended."""
    with contextlib.suppress(SystemExit):  # by torchrun
        time.sleep(_RANK_0_SPEAKS_SECONDS)


def printable(text: str) -> str:
    """Escape control characters: a tensor's name must neither break the line nor steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _run(args: argparse.Namespace) -> int:
    run: Command = args.run
    try:
        return run(args)
    except UsageError as error:
        return _failed(args, error, f"{error} See `streamsoup {args.command} --help`.", code=2)
    except RankError as error:
        if not args.rank:
            return _failed(args, error, str(error))
        leave_the_word()
        return 1
    except StreamsoupError as error:
        return _failed(args, error, str(error))
    except KeyboardInterrupt as error:
        return _failed(args, error, "Interrupted.", code=130)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        return _failed(args, error, "Terminated.", code=code) if code == 128 + signal.SIGTERM else code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        return _failed(args, error, "Out of memory. Give a smaller --budget.")
    except OSError as error:
        return _failed(args, error, f"{error.filename or 'system'}: {error.strerror or error}.")
    except Exception as error:
        text = f"Internal error: {type(error).__name__}: {error}. Run again with --debug and report it."
        return _failed(args, error, text)


def _failed(args: argparse.Namespace, error: BaseException, text: str, *, code: int = 1) -> int:
    if getattr(args, "debug", False):
        import traceback

        traceback.print_exception(error)
        return code
    say(text)
    for note in getattr(error, "__notes__", ()):
        for line in note.splitlines():
            say(line)
    return code
