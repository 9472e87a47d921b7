"""Several processes that work on one job, as torch.distributed counts them: rank 0 leads.

All ranks call the same functions in the same order. What one of them finds, or why it failed, goes to rank 0 and from
there to all, so no rank waits for another that is gone: a failure of one is an error of all that names it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from streamsoup.errors import RankError, RecipeError

T = TypeVar("T")

_LONGEST = timedelta(days=7)  # that one rank waits for another: those that die are noticed by their connection


class Ranks:
    """This process and those beside it; here: this one alone.

    Attributes
    ----------
    number : int
    count : int
    local_count : int
        Ranks on this machine.
    """

    number = 0
    count = 1
    local_count = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that leads."""
        return self.number == 0

    def fold(self, function: Callable[[], T], add: Callable[[T, T], T]) -> T:
        """Call a function on every rank, and return everywhere what its results add up to, in the order of ranks.

        Parameters
        ----------
        function : callable
            May itself call `fold`, `first` and `agree`, the same on every rank.
        add : callable taking what was added up so far, and one more result
            Called on rank 0.

        Raises
        ------
        RankError
            If the function failed on another rank, or one has died.
        """
        return function()

    def telling(self, function: Callable[[], T]) -> T:
        """Call a function that joins the other ranks; if it fails here, they are told why where they join next."""
        return function()

    def finish(self, function: Callable[[], T]) -> T:
        """Do as `first`, for the last time: rank 0 listens to nobody any more, and what it has done is done."""
        return function()

    def first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0, and return its result everywhere.

        Raises
        ------
        RankError
        """
        return self.fold(lambda: function() if self.is_first else None, keep_first)  # type: ignore[return-value]

    def device(self, name: str) -> str:
        """Return the device of this rank: where ``cuda`` is asked for, each rank of a machine has a GPU of its own."""
        if name != "cuda" or self.count == 1:
            return name
        import torch

        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(1, torch.cuda.device_count())}"

    def agree(self, what: str, found: str) -> None:
        """Check that all ranks have found the same.

        Raises
        ------
        RankError
            On all ranks, with the number of one that has not.
        """
        everybody = self.fold(lambda: {self.number: found}, lambda a, b: a | b)
        if others := sorted(number for number, theirs in everybody.items() if theirs != everybody[0]):
            raise RankError(
                f"rank {others[0]} has another {what} than rank 0. All ranks must see the same files and run the same "
                "version with the same options."
            )


ALONE = Ranks()


def keep_first(first: T, other: T) -> T:
    """Add nothing: the first rank's is the result."""
    return first


class ProcessGroup(Ranks):
    """Ranks of a gloo process group. See `Ranks`.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or None
        None: the default one.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        self._group = group
        self._silent = False
        self.number, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._names = [f"rank {number}" for number in range(self.count)]
        mine = {self.number: f"rank {self.number} ({socket.gethostname()}, process {os.getpid()})"}
        names = self.fold(lambda: mine, lambda a, b: a | b)
        self._names = [names[number] for number in range(self.count)]
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def fold(self, function: Callable[[], T], add: Callable[[T, T], T]) -> T:
        """See `Ranks`."""
        value = self.telling(function)
        # What interrupts an exchange of messages leaves nobody to talk to: the others notice by the connection.
        self._silent = True
        found = self._collect(value, add) if self.is_first else self._report(value)
        self._silent = False
        return found

    def telling(self, function: Callable[[], T]) -> T:
        """See `Ranks`."""
        try:
            return function()
        except BaseException as error:
            if not self._silent:
                self._silent = True
                self._give_up(error)
            raise

    def finish(self, function: Callable[[], T]) -> T:
        """See `Ranks`."""
        self._silent = True
        if not self.is_first:
            answer: T = self._answer()
            return answer
        try:
            value = function()
        except BaseException as error:
            self._tell_all(("failed", self._failure(error)))
            raise
        self._tell_all(("found", value))
        return value

    def _report(self, value: T) -> T:
        """Send what was found here to rank 0, and receive what came of it."""
        try:
            self._send(("found", value), 0)
        except RuntimeError as error:
            raise self._gone(0) from error
        answer: T = self._answer()
        return answer

    def _answer(self) -> Any:
        """Receive what rank 0 has to say."""
        try:
            kind, answer = self._receive(0)
        except RuntimeError as error:
            raise self._gone(0) from error
        if kind == "failed":
            raise RankError(str(answer))
        return answer

    def _gone(self, number: int) -> RankError:
        return RankError(f"{self._names[number]} has died; work that was finished is kept.")

    def _failure(self, error: BaseException) -> str:
        return f"{self._names[self.number]} failed: {str(error) or type(error).__name__}"

    def _collect(self, value: T, add: Callable[[T, T], T]) -> T:
        """Receive what the others found, and send them what came of it."""
        failures = []
        for number in range(1, self.count):
            kind, found = self._hear(number)
            if kind == "failed":
                failures.append(found)
            elif not failures:
                value = add(value, found)
        if failures:
            self._tell_all(("failed", failures[0]))
            raise RankError(failures[0])
        self._tell_all(("found", value))
        return value

    def _hear(self, number: int) -> tuple[str, Any]:
        try:
            found: tuple[str, Any] = self._receive(number)
        except RuntimeError:
            return "failed", str(self._gone(number))
        return found

    def _tell_all(self, message: tuple[str, Any]) -> None:
        for number in range(1, self.count):
            with contextlib.suppress(RuntimeError):  # one that is gone is noticed when it is to be heard
                self._send(message, number)

    def _give_up(self, error: BaseException) -> None:
        """Tell all ranks why this one fails."""
        message = "failed", self._failure(error)
        if not self.is_first:
            with contextlib.suppress(RuntimeError):
                self._send(message, 0)
                self._receive(0)
            return
        for number in range(1, self.count):
            kind, found = self._hear(number)
            if kind == "failed":
                error.add_note(str(found))
        self._tell_all(message)

    def _send(self, message: Any, to: int) -> None:
        import torch
        import torch.distributed as dist

        raw = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        dist.send(torch.tensor([len(raw)]), to, group=self._group)
        dist.send(raw, to, group=self._group)

    def _receive(self, source: int) -> Any:
        import torch
        import torch.distributed as dist

        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, source, group=self._group)
        raw = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(raw, source, group=self._group)
        return pickle.loads(raw.numpy().tobytes())


@contextlib.contextmanager
def join_ranks(distributed: bool) -> Iterator[Ranks]:
    """Join the other ranks, if there are to be any.

    Raises
    ------
    RecipeError
        If this process was not started as one of several.
    """
    if not distributed:
        yield ALONE
        return
    import torch.distributed as dist

    if dist.is_initialized():  # somebody's training: a group of our own, beside theirs
        group = dist.new_group(backend="gloo", timeout=_LONGEST)
        try:
            yield ProcessGroup(group)
        finally:
            dist.destroy_process_group(group)
        return
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RecipeError(
            f"distributed: {missing[0]} is not set in the environment. Start the processes with torchrun."
        )
    dist.init_process_group("gloo", timeout=_LONGEST)
    try:
        yield ProcessGroup()
    finally:
        dist.destroy_process_group()


_SIGNS = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "GROUP_RANK")


def is_rank() -> bool:
    """Whether torchrun started this very process as one of several, and not a process that it started.

    Such a process has the same variables as its parent; torchrun has not, though it may have been given a rank itself.
    """
    if not os.environ.get("WORLD_SIZE", "").isdigit() or int(os.environ["WORLD_SIZE"]) < 2:
        return False
    if not os.environ.get("RANK", "").isdigit():
        return False
    if not sys.platform.startswith("linux"):
        return True
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            pairs = [entry.partition(b"=") for entry in file.read().split(b"\0")]
    except OSError:
        return True
    theirs = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    return any(theirs.get(name) != os.environ.get(name) for name in _SIGNS)
