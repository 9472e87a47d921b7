"""Uses the library as a program would, and answers with what is different afterwards, as a line of JSON.

python host_process_driver.py FOLDER RUN...
"""

from __future__ import annotations

import contextlib
import gc
import json
import locale
import logging
import os
import random
import resource
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import streamsoup
from streamsoup.hosts.averaged_model import AveragedModel


def state_of_the_process() -> dict[str, Any]:
    """All that a library has no business with."""
    loggers = [logging.getLogger(), logging.getLogger("streamsoup")]
    return {
        "signals": {int(s): repr(signal.getsignal(s)) for s in signal.valid_signals()},
        "mask": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "environment": {name: hash(value) for name, value in os.environ.items()},  # values may be secrets
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "limits": [resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT_")],
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch": (
            str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision(),
            torch.random.get_rng_state().tolist(),
        ),
        "numpy": (np.geterr(), np.random.get_state()[1].tolist(), np.get_printoptions()["precision"]),
        "random": random.getstate(),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "logging": [(logger.level, len(logger.handlers), logger.propagate, logger.disabled) for logger in loggers],
        "disabled": logging.root.manager.disable,
        "warnings": len(warnings.filters),
        "hooks": [repr(h) for h in (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr, sys.unraisablehook)],
        "recursion": sys.getrecursionlimit(),
        "switching": sys.getswitchinterval(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii"),
    }  # fmt: skip


def use(folder: Path, runs: list[str]) -> None:
    streamsoup.soup(runs, folder / "soup", method="linear")
    streamsoup.soup(runs[1:], folder / "ties", method="ties", base=runs[0])
    running = streamsoup.RunningSoup(runs)
    for run in runs:
        running.add(run)
    running.remove(runs[0]).mean().save(folder / "mean")
    with streamsoup.open(runs) as view:
        state = dict(view)
        view.slice(next(iter(view)))[1:3]
    streamsoup.RunningSoup(state).add(state).mean().tensors()
    average = AveragedModel(torch.nn.Linear(3, 4))
    average.update_parameters(torch.nn.Linear(3, 4))
    streamsoup.greedy(runs, folder / "greedy", score=lambda candidate: float(len(candidate.members)))
    with contextlib.suppress(streamsoup.StreamsoupError):
        streamsoup.soup([*runs, str(folder / "nothing")], folder / "none")


def main(folder: Path, runs: list[str]) -> dict[str, Any]:
    use(folder / "warm", runs)  # imports and compiles: what numba and torch do then is theirs
    torch.nn.Linear(3, 4)
    before = state_of_the_process()
    torch_state = torch.random.get_rng_state()
    use(folder / "again", runs)
    torch.random.set_rng_state(torch_state)  # the modules above draw their weights
    gc.collect()
    after = state_of_the_process()
    return {key: [before[key], after[key]] for key in before if repr(before[key]) != repr(after[key])}


if __name__ == "__main__":
    told = sys.stdout
    (Path(sys.argv[1]) / "warm").mkdir()
    (Path(sys.argv[1]) / "again").mkdir()
    changed = main(Path(sys.argv[1]), sys.argv[2:])
    print(json.dumps(changed, default=str), file=told)
