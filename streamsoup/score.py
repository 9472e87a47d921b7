"""What a loop asks for a number: a Python callable, or any command."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from streamsoup.errors import ScoreError

JOB_VARIABLE = "STREAMSOUP_JOB"
_QUOTED_LINES = 20


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation said: the number that decides, and others that are recorded."""

    value: float
    also: Mapping[str, float] = field(default_factory=dict)


class Score(Protocol):
    """Any evaluator. It gets a `Candidate` and returns a number (or a mapping, see `read_scores`)."""

    def __call__(self, candidate: Any) -> Any:
        """Return the held-out score."""
        ...


class Place:
    """Where one of several commands runs beside the others; another thread may end it there.

    Parameters
    ----------
    job : int
        0, 1 ...: a command finds it in its environment, as ``STREAMSOUP_JOB``, and may choose its device by it.
    """

    def __init__(self, job: int = 0) -> None:
        self.job = job
        self.is_ended = False
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def hold(self, process: subprocess.Popen[str] | None) -> None:
        """Take the process that runs here now, or None when it is over."""
        with self._lock:
            self._process = process
            if self.is_ended:
                self._kill()

    def end(self) -> None:
        """Kill the command that runs here, with its children; one that has yet to begin is killed when it does."""
        with self._lock:
            self.is_ended = True
            self._kill()

    def _kill(self) -> None:
        # Its number is nobody else's before it was waited for.
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class CommandScore:
    """Scores a checkpoint on disk with a command.

    Attributes
    ----------
    command : str
        Split like a shell would, but run without one. ``{soup}`` becomes the checkpoint (a folder, or a file where the
        ingredients are files), ``{soup_file}`` its one .safetensors file, ``{result}`` a file for JSON.
    metric : str or None
        Dotted path of a key in that JSON, or in JSON printed last. None: the last line printed is the number.
    also : tuple of str
        More keys to record.
    timeout_seconds : float or None
    """

    command: str
    metric: str | None = None
    also: tuple[str, ...] = ()
    timeout_seconds: float | None = None

    needs_files = True

    def __call__(self, candidate: Any) -> Scores:
        """Run the command on ``candidate.path``; see `at`."""
        return self.at(candidate.path, Place())

    def at(self, checkpoint: Path, place: Place) -> Scores:
        """Run the command on a checkpoint, in a place of its own.

        Raises
        ------
        ScoreError
            If it fails, takes too long, or gives no finite number.
        """
        with tempfile.TemporaryDirectory(prefix="streamsoup-") as folder:
            result = Path(folder) / "result.json"
            output = run_command(self.command, checkpoint, result, self.timeout_seconds, place)
            if "{result}" in self.command:
                document = self._read_result(result, output)
            else:
                document = _last_json(output) if self.metric or self.also else None
            if self.metric is None:
                value = _number(output.strip().splitlines()[-1] if output.strip() else "", "the last line", output)
            else:
                value = _number(_look_up(document, self.metric, output), f"metric {self.metric!r}", output)
            also = {key: _number(_look_up(document, key, output), f"metric {key!r}", output) for key in self.also}
        return Scores(value, also)

    def _read_result(self, result: Path, output: str) -> Any:
        try:
            return json.loads(result.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _failed(f"{self.command}: wrote no JSON to {{result}} ({error}).", output) from error


def run_command(
    command: str, checkpoint: Path, result: Path, timeout_seconds: float | None, place: Place | None = None
) -> str:
    """Run a command on a checkpoint and return what it printed.

    `place`: where it runs, if others run beside it.

    Raises
    ------
    ScoreError
        If it cannot be started, fails, or takes too long; its output is quoted.
    """
    words = [_fill(word, checkpoint, result) for word in shlex.split(command)]
    place = place or Place()
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, JOB_VARIABLE: str(place.job)},
        )
    except (OSError, IndexError) as error:
        raise ScoreError(f"{command}: cannot be started ({error}).") from error
    try:
        place.hold(process)
        output, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        output, errors = process.communicate()
        raise _failed(
            f"{command}: took longer than {timeout_seconds:g} s on {checkpoint}. Give it more with --score-timeout.",
            output + errors,
        ) from None
    except BaseException:
        _kill(process)
        process.communicate()  # closes the pipes
        raise
    finally:
        place.hold(None)
    if process.returncode:
        raise _failed(f"{command}: failed with exit code {process.returncode} on {checkpoint}.", output + errors)
    return output


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _fill(word: str, checkpoint: Path, result: Path) -> str:
    word = word.replace("{soup}", str(checkpoint)).replace("{result}", str(result))
    if "{soup_file}" in word:
        files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.glob("*.safetensors"))
        if len(files) != 1:
            raise ScoreError(
                f"{checkpoint}: has {len(files)} .safetensors files, so {{soup_file}} names none. Use {{soup}}."
            )
        word = word.replace("{soup_file}", str(files[0]))
    return word


def read_scores(found: Any, metric: str | None, also: Sequence[str]) -> Scores:
    """Take the numbers out of what a callable returned: a number, a mapping with `metric`, or `Scores`.

    Raises
    ------
    ScoreError
        If there is no finite number.
    """
    if isinstance(found, Scores):
        _number(found.value, "the score", "")
        return found
    if isinstance(found, Mapping):
        if metric is None:
            raise ScoreError(f"The score is a mapping with keys {sorted(found)}; say which one decides with metric=.")
        rest = {key: _number(_look_up(found, key), f"metric {key!r}", "") for key in also}
        return Scores(_number(_look_up(found, metric), f"metric {metric!r}", ""), rest)
    return Scores(_number(found, "the score", ""))


def _last_json(output: str) -> Any:
    """Return the JSON value with which the output ends: one line, or several from an opening brace on."""
    lines = output.strip().splitlines()
    for first in range(len(lines) - 1, -1, -1):
        if lines[first].lstrip().startswith(("{", "[")):
            with contextlib.suppress(ValueError):
                return json.loads("\n".join(lines[first:]))
    raise _failed("No JSON at the end of the output.", output)


def _look_up(document: Any, path: str, output: str = "") -> Any:
    """Follow a dotted path; a key that itself has dots is found too."""
    if isinstance(document, Mapping):
        if path in document:
            return document[path]
        for key in document:
            if path.startswith(f"{key}."):
                return _look_up(document[key], path[len(str(key)) + 1 :], output)
    keys = sorted(map(str, document)) if isinstance(document, Mapping) else type(document).__name__
    raise _failed(f"No metric {path!r}; there is {keys}.", output)


def _number(value: Any, what: str, output: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _failed(f"{what} is {value!r}, not a number.", output) from None
    if not math.isfinite(number):
        raise _failed(f"{what} is {number}, which decides nothing.", output)
    return number


def _failed(message: str, output: str) -> ScoreError:
    """Make an error with the end of what the evaluator printed as a note."""
    error = ScoreError(message)
    if output.strip():
        error.add_note("\n".join(f"| {line}" for line in output.strip().splitlines()[-_QUOTED_LINES:]))
    return error
