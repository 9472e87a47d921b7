"""Runs a greedy soup in a process of its own that may kill itself at a chosen point; also the evaluator.

python greedy_driver.py run JOB.json      start or resume, and die at the n-th call of a function
python greedy_driver.py score TARGET.npy LOG CHECKPOINT
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from dying import die_at


def score(target: str, log: str, checkpoint: str) -> None:
    """Print how near a checkpoint is to a target, and write down that we were asked."""
    import ml_dtypes
    import numpy as np

    raw = (Path(checkpoint) / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, end = header["w"]["data_offsets"]
    values = np.frombuffer(raw[8 + length + begin : 8 + length + end], ml_dtypes.bfloat16).astype(np.float64)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{values.tobytes().hex()[:64]}\n")
    print(-float(np.square(values - np.load(target)).sum()))


def find(point: str) -> tuple[object, str]:
    """The owner and the name of ``module:qualified.name``."""
    module_name, _, name = point.partition(":")
    owner = importlib.import_module(module_name)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, last


def main() -> None:
    if sys.argv[1] == "score":
        score(*sys.argv[2:])
        return
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    import streamsoup

    if job["point"]:
        die_at(*find(job["point"]), job["number"], job["before"])
    if (Path(job["workdir"]) / "greedy.json").exists():
        streamsoup.resume_greedy(job["workdir"])
    else:
        streamsoup.greedy(
            job["runs"], job["out"], score=job["score"], workdir=job["workdir"], budget_bytes="200MiB", sums=job["sums"]
        )


if __name__ == "__main__":
    main()
