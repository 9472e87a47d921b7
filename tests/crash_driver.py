"""Makes soups in processes that kill themselves at a chosen point. A script, not a test: it reads jobs, JSON, a line
each, from standard input, runs each in a fork of its own, and answers with the exit status and standard error.

JOB: {"point": name, "number": n, "before": bool, ...}; the process dies at the n-th call of the point, after the call
did its work, or before it.
"""

import json
import os
import signal
import sys
import tempfile
import traceback

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


def arm(point, number, before):
    owner, name = POINTS[point]
    function = getattr(owner, name)
    calls = [0]

    def deadly(*args, **options):
        calls[0] += 1
        if before and calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **options)
        if not before and calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def run(job):
    # Many journal entries in a soup of a few hundred kilobytes.
    engine._COMMIT_SECONDS = 0.001
    if job.get("no_exchange"):
        write._renameat2 = lambda *_: False
    if job.get("point"):
        arm(job["point"], job["number"], job.get("before", False))
    if job.get("resume"):
        streamsoup.resume(job["out"], streamsoup.Execution(workers=2))
    else:
        streamsoup.soup(job["ingredients"], job["out"], **job.get("options", {}))


def main():
    open_backend("cpu").prepare(wide=False, fp8=False)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                try:
                    run(json.loads(line))
                except BaseException:
                    errors.write(traceback.format_exc().encode())
                    errors.flush()
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            errors.seek(0)
            answer = {"code": os.waitstatus_to_exitcode(status), "errors": errors.read().decode()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
