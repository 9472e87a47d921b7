"""One rank of several: does jobs, JSON on the command line, and writes down what came of each. A script, not a test.

python ranks_driver.py JOBS.json ANSWERS      (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are in the environment)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

from dying import die_at

import streamsoup
from streamsoup import journal, making, ranks, side_files, soup_plan, tiling, workspace, write
from streamsoup.execution import Execution

POINTS = {
    "tile": (write.FileSink, "write"),
    "sync": (write.FileSink, "sync"),
    "journal": (journal.Journal, "append"),
    "sums": (making, "reduce_all"),
    "copies": (making, "copy_all"),
    "workspace": (workspace.Workspace, "create"),
    "job": (workspace.Workspace, "write_job"),
    "side files": (side_files, "write_durably"),
    "publish": (workspace.Workspace, "publish"),
    "plan": (soup_plan, "make_plan"),
    "finish": (ranks.ProcessGroup, "finish"),
}


def interrupt(number):
    """Have Ctrl-C arrive right after the n-th message has."""
    real, calls = ranks.ProcessGroup._receive, itertools.count(1)

    def receive(self, source):
        message = real(self, source)
        if next(calls) == number:
            raise KeyboardInterrupt
        return message

    ranks.ProcessGroup._receive = receive


def small_tiles(blocks):
    """Tiles of some blocks; see test_methods."""
    stack = contextlib.ExitStack()
    elements = blocks * tiling.BLOCK_ELEMENTS
    stack.enter_context(patch("streamsoup.tiling._preferences", lambda workers: [(elements, workers)]))
    stack.enter_context(patch("streamsoup.tiling._whole_tensors", lambda whole, workers: []))
    return stack


def do(job):
    """Make a soup, or go on with one; returns what the test wants to know."""
    rank = int(os.environ["RANK"])
    die = job.get("die")
    if die and die["rank"] == rank:
        die_at(*POINTS[die["point"]], die["number"], die["before"])
    if job.get("interrupt") and job["interrupt"]["rank"] == rank:
        interrupt(job["interrupt"]["number"])
    shares = []
    with small_tiles(job.get("blocks", 8)):
        if job.get("here"):
            os.chdir(job["here"][rank])
        if job.get("resume"):
            result = streamsoup.resume(job["out"], Execution(distributed=True))
        else:
            options = {"distributed": True, "progress": shares.append, **job.get("options", {})}
            options |= job.get("of_rank", {}).get(str(rank), {})
            result = streamsoup.soup(job["ingredients"], job["out"], **options)
    return {
        "path": str(result.path),
        "ranks": result.ranks,
        "bytes_read": result.bytes_read,
        "digests": result.content_digests,
        "notes": result.notes,
        "share": shares[-1].done_bytes if shares else 0,
        "share_of": shares[-1].total_bytes if shares else 0,
    }


def main():
    jobs, answers = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if len(jobs) > 1:  # as in somebody's training: their group is there, and ours comes and goes
        import torch.distributed as dist

        dist.init_process_group("gloo")
    with open(answers / os.environ["RANK"], "w", encoding="utf-8", buffering=1) as file:
        for job in jobs:
            try:
                answer = do(job)
            except BaseException as error:
                answer = {"error": type(error).__name__, "said": str(error), "notes": getattr(error, "__notes__", [])}
            file.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
