"""Processes that kill themselves at a chosen call: what the tests of crashes share.

A script answers jobs, a JSON line each from standard input, each in a fork of its own that may kill itself, so that
torch and numba are imported once; `serving` is the test's end of it.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager


def die_at(owner, name, number, before=False):
    """Have this process kill itself at the n-th call of a function, before or after that call did its work.

    A call knows its own number: with several workers another may have begun before it ends.
    """
    real, numbers = getattr(owner, name), itertools.count(1)

    def deadly(*args, **options):
        mine = next(numbers) == number
        if mine and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **options)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def serve(run):
    """Answer each job with the exit code of its fork, its errors, and the dict that `run(job)` returned, if any."""
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
            child = os.fork()
            if child == 0:
                code = 0
                try:
                    json.dump(run(json.loads(line)) or {}, said)
                except BaseException:
                    said.write(traceback.format_exc())
                    code = 1
                said.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            text = said.read()
        answer = {"code": code, "errors": text} if code else {"code": 0, "errors": "", **json.loads(text)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


@contextmanager
def serving(script):
    """Start a script that serves; yields a function from a job to its answer."""
    command = [sys.executable, str(script)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:

        def ask(job):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, f"{script} has ended"
            return json.loads(answer)

        yield ask
        process.stdin.close()
