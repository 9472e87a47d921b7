"""The three lanes of a device: bytes go up on one, are computed with on the second, and come down on the third.

Work is put on a lane and done in order there, while the host goes on. A mark is put behind some work; another lane, or
the host, waits for it. On CUDA a lane is a stream and a mark an event. Elsewhere all is done at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol

import torch

from streamsoup.errors import DeviceMemoryError
from streamsoup.units import format_binary


class Lane(Enum):
    """Where work is done."""

    UP = "up"
    RUN = "run"
    DOWN = "down"


class Mark(Protocol):
    """A place on a lane: behind the work that it was last given to; before all, at first."""

    def wait(self) -> None:
        """Have the host wait until that work is done."""
        ...


class Lanes(Protocol):
    """One device, and what is done on it and on the way to it. Threads may share it.

    Attributes
    ----------
    device : torch.device
    turn : Lock
        Held by whoever computes with memory that is given back at once: the device has room for one of them.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def turn(self) -> threading.Lock: ...

    def host(self, nbytes: int) -> torch.Tensor:
        """Allocate host memory that the device can copy from and to while the host goes on; uint8, shape (nbytes,).

        Raises
        ------
        DeviceMemoryError
        """
        ...

    def memory(self, nbytes: int) -> torch.Tensor:
        """Allocate memory of the device, for all lanes; uint8, shape (nbytes,).

        Other lanes must wait once for what is on the lane of arithmetic by then: it may still use that memory.

        Raises
        ------
        torch.OutOfMemoryError
        """
        ...

    def mark(self) -> Mark:
        """Make a mark."""
        ...

    def put(self, lane: Lane, work: Callable[[], None], *, after: Sequence[Any] = (), then: Any) -> None:
        """Put work on a lane: it begins when what is marked by `after` is done, and `then` marks its end.

        The function is called once, and queues the work; when that is, is not the caller's business.
        """
        ...

    def follow_caller(self) -> None:
        """Have what is put on the lanes from now on wait for what the calling thread has queued on the device.

        Somebody's network may still be computing with parameters that are to be overwritten.
        """
        ...

    def free_bytes(self) -> int | None:
        """Bytes of the device's memory that are free; None: nobody knows."""
        ...

    def release(self) -> None:
        """Give back what the framework keeps of the device's memory for later."""
        ...


class _Done:
    """See `Mark`."""

    def wait(self) -> None:
        """See `Mark`."""


class ImmediateLanes:
    """See `Lanes`: for devices without streams, and for tests."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.turn = threading.Lock()

    def host(self, nbytes: int) -> torch.Tensor:
        """See `Lanes`. Nothing is page-locked."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def memory(self, nbytes: int) -> torch.Tensor:
        """See `Lanes`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> Mark:
        """See `Lanes`."""
        return _Done()

    def put(self, lane: Lane, work: Callable[[], None], *, after: Sequence[Any] = (), then: Any) -> None:
        """See `Lanes`."""
        work()

    def follow_caller(self) -> None:
        """See `Lanes`."""

    def free_bytes(self) -> int | None:
        """See `Lanes`."""
        return None

    def release(self) -> None:
        """See `Lanes`."""


class _EventMark:
    """See `Mark`. A thread that waits sleeps: others copy meanwhile."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """See `Mark`."""
        self.event.synchronize()


class CudaLanes:
    """See `Lanes`: three streams of a GPU, which its copy engines and its processors work on side by side."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.turn = threading.Lock()
        self._streams = {lane: torch.cuda.Stream(device) for lane in Lane}  # type: ignore[no-untyped-call]

    def host(self, nbytes: int) -> torch.Tensor:
        """See `Lanes`. Page-locked: others are copied through a buffer of the driver's, and the host waits for that."""
        try:
            with torch.cuda.device(self.device):
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise DeviceMemoryError(
                f"device {self.device}: {format_binary(nbytes)} of host memory cannot be page-locked for it "
                f"({str(error).splitlines()[0]}). Give a smaller --budget, fewer --threads, or --device cpu.",
                device=str(self.device),
                wanted_bytes=nbytes,
            ) from error

    def memory(self, nbytes: int) -> torch.Tensor:
        """See `Lanes`. Freed memory is not used again before the last work with it on each lane is done."""
        with torch.cuda.stream(self._streams[Lane.RUN]):
            found = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        for lane in (Lane.UP, Lane.DOWN):
            found.record_stream(self._streams[lane])
        return found

    def mark(self) -> Mark:
        """See `Lanes`."""
        return _EventMark()

    def put(self, lane: Lane, work: Callable[[], None], *, after: Sequence[Any] = (), then: Any) -> None:
        """See `Lanes`. The stream waits, not the host."""
        stream = self._streams[lane]
        with torch.cuda.stream(stream):
            for mark in after:
                stream.wait_event(mark.event)
            work()
            then.event.record(stream)

    def follow_caller(self) -> None:
        """See `Lanes`."""
        theirs = torch.cuda.current_stream(self.device)
        for stream in self._streams.values():
            stream.wait_stream(theirs)

    def free_bytes(self) -> int | None:
        """See `Lanes`."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def release(self) -> None:
        """See `Lanes`."""
        torch.cuda.empty_cache()


def open_lanes(device: torch.device) -> Lanes:
    """Open the lanes of a device."""
    return CudaLanes(device) if device.type == "cuda" else ImmediateLanes(device)
