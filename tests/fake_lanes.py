"""Lanes that do nothing by themselves: work is done when somebody waits for it, or when chance will have it."""

from __future__ import annotations

import random
import threading

import torch

from streamsoup.backends.lanes import ImmediateLanes, Lane


class LateWork:
    def __init__(self, lane, function, needs):
        self.lane, self.function, self.needs = lane, function, needs
        self.is_done = False


class LateMark:
    def __init__(self, lanes):
        self.lanes = lanes
        self.work = None

    def wait(self):
        self.lanes.log.append(("wait", self))
        self.lanes.finish(self.work)


class LateLanes(ImmediateLanes):
    """Does work as late as it may be done. What must be done before some work is what was put on its lane before, and
    what it waits for: nothing else is.

    `eager`: a lane whose work is done at once; `seed`: some work is done earlier, at random; `deaf`: a lane, and the
    lane that it does not wait for.
    """

    def __init__(self, device, seed=None, eager=None, deaf=(None, None)):
        super().__init__(device)
        self.log = []
        self.host_bytes, self.device_bytes = [], []
        self.released = 0
        self._random = None if seed is None else random.Random(seed)
        self._eager = eager
        self._deaf = deaf
        self._last = {}
        self._lock = threading.RLock()

    def host(self, nbytes):
        self.host_bytes.append(nbytes)
        return super().host(nbytes).fill_(0xAA)

    def memory(self, nbytes):
        self.device_bytes.append(nbytes)
        return super().memory(nbytes).fill_(0x55)

    def mark(self):
        return LateMark(self)

    def put(self, lane, work, *, after=(), then):
        with self._lock:
            self.log.append(("put", lane, tuple(after), then))
            heard = [mark.work for mark in after if mark.work and (lane, mark.work.lane) != self._deaf]
            before = self._last.get(lane)
            then.work = self._last[lane] = LateWork(lane, work, [before, *heard] if before else heard)
            if lane is self._eager:
                self.finish(then.work)
            if self._random is not None and self._random.random() < 0.5:
                self.finish(self._last[self._random.choice(list(self._last))])

    def finish(self, work):
        with self._lock:
            if work is None or work.is_done:
                return
            for other in work.needs:
                self.finish(other)
            work.is_done, work.needs = True, []
            work.function()

    def release(self):
        self.released += 1


class NarrowLanes(LateLanes):
    """Has no memory for more than so many bytes at a time."""

    most_bytes = 1 << 40

    def memory(self, nbytes):
        if nbytes > self.most_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().memory(nbytes)


__all__ = ["Lane", "LateLanes", "NarrowLanes"]
