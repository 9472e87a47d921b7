"""Makes soups in processes that kill themselves at a chosen point. A script, not a test: it reads jobs, JSON, a line
each, from standard input, runs each in a fork of its own, and answers with the exit status and standard error.

JOB: {"point": name, "number": n, "before": bool, ...}; the process dies at the n-th call of the point, after the call
did its work, or before it.
"""

import os

from dying import die_at, serve

import streamsoup
from streamsoup import cook, engine, journal, side_files, workspace, write
from streamsoup.backends import open_backend

POINTS = {
    "tile": (write.FileSink, "write"),
    "sync": (write.FileSink, "sync"),
    "shards reserved": (write.FileSink, "__init__"),
    "journal": (journal.Journal, "append"),
    "job": (workspace.Workspace, "write_job"),
    "workspace": (workspace.Workspace, "create"),
    "publish": (workspace.Workspace, "publish"),
    "workspace removed": (workspace.Workspace, "remove"),
    "side file": (side_files, "write_durably"),
    "side files": (cook, "write_side_files"),
    "renameat2": (write, "_renameat2"),
    "replace": (os, "replace"),
    "rename": (os, "rename"),
    "fsync": (os, "fsync"),
    "pwrite": (os, "pwrite"),
    "unlink": (os, "unlink"),
    "rmdir": (os, "rmdir"),
    "mkdir": (os, "mkdir"),
}


def run(job):
    # Many journal entries in a soup of a few hundred kilobytes.
    engine._COMMIT_SECONDS = 0.001
    if job.get("no_exchange"):
        write._renameat2 = lambda *_: False
    if job.get("point"):
        die_at(*POINTS[job["point"]], job["number"], job.get("before", False))
    if job.get("resume"):
        streamsoup.resume(job["out"], streamsoup.Execution(workers=2))
    else:
        streamsoup.soup(job["ingredients"], job["out"], **job.get("options", {}))


def main():
    open_backend("cpu").prepare(wide=False, fp8=False)
    serve(run)


if __name__ == "__main__":
    main()
