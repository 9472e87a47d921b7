"""A folder for large files that go away again, even after a run that was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from streamsoup.errors import ResumeError
from streamsoup.files import lock_folder

_PREFIX = "streamsoup-bench-"
_MARK = ".made-by-streamsoup-bench"


@contextlib.contextmanager
def scratch_folder(parent: str | Path | None) -> Iterator[Path]:
    """Make a folder, and remove it at the end; and those beside it that a killed run left.

    A folder is taken for abandoned if it has the name and the mark of ours, and no living process holds it.
    """
    place = Path(parent or tempfile.gettempdir())
    for folder in place.glob(f"{_PREFIX}*"):
        if (folder / _MARK).is_file():
            with contextlib.suppress(ResumeError):
                held = lock_folder(folder)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place) as name:
        held = lock_folder(Path(name))
        try:
            (Path(name) / _MARK).touch()
            yield Path(name)
        finally:
            os.close(held)
