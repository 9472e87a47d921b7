"""Makes one learned soup and says how much memory it owned at most. A script, not a test; see memory_driver.py.

The level is that with the module, after a first small learned soup; the gradient comes above it. With "limit"
RLIMIT_DATA is lowered to the level, the budget and the gradient.
"""

import ctypes
import json
import mmap
import resource
import sys
import tempfile
import threading
from pathlib import Path

import torch
from learning_pools import TORCH
from torch import nn

import streamsoup

JOB = json.loads(sys.argv[1])
libc = ctypes.CDLL(None)


def owned():
    total = 0
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(("Anonymous:", "Pss_Shmem:")):
            total += 1024 * int(line.split()[1])
    return total


def status(label):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(label))
    return 1024 * int(line.split()[1])


class Sampler(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.base, self.peak, self.done = owned(), 0, threading.Event()

    def run(self):
        while not self.done.wait(0.005):
            self.peak = max(self.peak, owned() - self.base)


class Chain(nn.Module):
    """Square matrices one after another."""

    def __init__(self, width, count):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(count)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Hog:
    """Takes memory of one kind after the first step, touches it, and keeps it a while."""

    def __init__(self, kind, size):
        self.kind, self.size, self.held = kind, size, None

    def __call__(self, record):
        if self.held is None:
            self.held = bytearray(self.size) if self.kind == "private" else mmap.mmap(-1, self.size)
            for at in range(0, self.size, 4096):
                self.held[at] = 1
            threading.Event().wait(0.2)


def learn(module, width, **options):
    batches = [
        (torch.randn(4, width, dtype=TORCH[JOB["dtype"]]), torch.randint(0, width, (4,))) for _ in range(JOB["steps"])
    ]

    def loss_fn(logits, targets):
        return nn.functional.cross_entropy(logits.float(), targets)

    return streamsoup.learn(
        options.pop("ingredients"), module, loss_fn, batches, epochs=1, read_mode=JOB["mode"],
        **{**JOB.get("options", {}), **options},
    )  # fmt: skip


def main():
    torch.set_num_threads(1)
    kind = TORCH[JOB["dtype"]]
    # Imports, compilation, thread-local arenas and the thread of autograd belong to the level.
    from learning_pools import stored_states, write_states

    with tempfile.TemporaryDirectory() as folder:
        small = Chain(200, JOB["matrices"])
        paths = write_states(Path(folder), stored_states(small, 3, dtype=JOB["dtype"]))
        learn(small.to(kind), 200, ingredients=paths, out=Path(folder) / "soup")
        del small
    module = Chain(JOB["width"], JOB["matrices"]).to(kind)
    size = sum(p.nbytes for p in module.parameters())
    libc.malloc_trim(0)
    sampler = Sampler()
    if JOB["limit"]:
        # The sampler's own stack and arena; activations and the random batches.
        level = status("VmData:") + (9 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (level + JOB["budget"] + size + (2 << 20), resource.RLIM_INFINITY))
    sampler.start()
    answer = {"error": None, "gradient": size}
    hog = {"on_step": Hog(JOB["hog"], JOB["hog_bytes"])} if "hog" in JOB else {}
    try:
        result = learn(
            module, JOB["width"], ingredients=JOB["ingredients"], out=JOB["out"], budget_bytes=JOB["budget"], **hog
        )
        answer |= {
            "projected": result.projected_peak_bytes,
            "reported": result.measured_peak_bytes,
            "bytes_read": result.bytes_read,
            "steps": len(result.steps),
        }
    except BaseException as error:
        answer["error"] = repr(error)
    sampler.done.set()
    sampler.join()
    sys.stdout.write(json.dumps(answer | {"peak": sampler.peak}))


main()
