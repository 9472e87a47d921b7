"""Makes one soup and says how much memory it owned at most. A script, not a test; it samples what the kernel counts
(`Anonymous` and `Pss_Shmem` in smaps_rollup), and with "limit" lowers RLIMIT_DATA to the level after a first small
soup plus the budget."""

import ctypes
import json
import mmap
import resource
import sys
import tempfile
import threading
from pathlib import Path

from factory import realistic, write_checkpoint

import streamsoup

JOB = json.loads(sys.argv[1])
libc = ctypes.CDLL(None)


def owned() -> int:
    total = 0
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(("Anonymous:", "Pss_Shmem:")):
            total += 1024 * int(line.split()[1])
    return total


def status(label: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(label))
    return 1024 * int(line.split()[1])


class Sampler(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.base = owned()
        self.peak = 0
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.01):
            self.peak = max(self.peak, owned() - self.base)


class Hog:
    """Takes memory of one kind in the middle of the run, touches it, and keeps it a while."""

    def __init__(self, kind, size):
        self.kind, self.size, self.held = kind, size, None

    def __call__(self, progress):
        if self.held is None and progress.done_bytes:
            if self.kind == "private":
                self.held = bytearray(self.size)
            else:
                self.held = mmap.mmap(-1, self.size)
            for at in range(0, self.size, 4096):
                self.held[at] = 1
            threading.Event().wait(0.3)


def main():
    # Imports, compilation and thread-local arenas belong to the level: a first soup of the same kind pays for them.
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(write_checkpoint(Path(folder) / f"r{i}", realistic(i, {"w": (9000,)}, JOB["warm"])))
                 for i in range(3)]  # fmt: skip
        base = {"base": paths.pop()} if "base" in JOB.get("options", {}) else {}
        streamsoup.soup(paths, Path(folder) / "soup", read_mode=JOB["mode"], **{**JOB.get("options", {}), **base})
    libc.malloc_trim(0)
    sampler = Sampler()
    if JOB["limit"]:
        # The sampler's own stack, and the arena that glibc reserves for each new thread (64 MiB of address space,
        # not writable until used, so not counted).
        level = status("VmData:") + (9 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (level + JOB["budget"], resource.RLIM_INFINITY))
    sampler.start()
    progress = Hog(JOB["hog"], JOB["hog_bytes"]) if "hog" in JOB else None
    answer = {"error": None}
    try:
        result = streamsoup.soup(
            JOB["ingredients"], JOB["out"], budget_bytes=JOB["budget"], read_mode=JOB["mode"], progress=progress,
            keep=False, **JOB.get("options", {}),
        )  # fmt: skip
        answer |= {
            "projected": result.projected_peak_bytes,
            "reported": result.measured_peak_bytes,
            "bytes_read": result.bytes_read,
        }
    except BaseException as error:
        answer["error"] = repr(error)
    sampler.done.set()
    sampler.join()
    sys.stdout.write(json.dumps(answer | {"peak": sampler.peak}))


main()
