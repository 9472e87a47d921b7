"""Make the environments of the peers: one for each, with the exact versions in benchmarks/pins/*.txt.

    python benchmarks/environments.py [--dir DIR]

What is there already, with the same pins, is left as it is. Needs Python's venv and pip, nothing else.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_DIR = HERE.parent / ".bench-env"
# The module that must be importable in each.
ENVIRONMENTS = {"torch": "safetensors.torch", "mergekit": "mergekit.scripts.merge_raw_pytorch", "sd-mecha": "sd_mecha"}
# Of the packages that streamsoup is a part of, for tests: all in one.
HOSTS = {"lightning": "accelerate, datasets, lightning.pytorch, lm_eval, transformers, zarr"}
_DONE = "pins.txt"  # written last: an installation that was interrupted is made anew


def pins(name: str) -> str:
    """Read the exact versions of an environment, one a line."""
    return (HERE / "pins" / f"{name}.txt").read_text(encoding="utf-8")


def pinned_version(name: str) -> str:
    """Version of the package that gives an environment its name."""
    return dict(line.split("==") for line in pins(name).split())[name]


def python_of(folder: Path, name: str) -> str:
    """Path of an environment's Python; without one with these pins, the benchmark ends and says what to do."""
    if not _is_made(folder / name, name):
        suffix = "" if folder.resolve() == DEFAULT_DIR else f" --dir {folder}"
        raise SystemExit(
            f"{folder / name}: no environment with these pins. Run python benchmarks/environments.py{suffix}"
        )
    return str((folder / name / "bin" / "python").absolute())


def make(folder: Path, name: str) -> str:
    """Make an environment unless it is there, check that it works, and return what was done."""
    target = folder / name
    if _is_made(target, name):
        return "there already"
    began = time.perf_counter()
    shutil.rmtree(target, ignore_errors=True)
    venv.create(target, with_pip=True)
    python = str(target / "bin" / "python")
    required = str(HERE / "pins" / f"{name}.txt")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", required], check=True)
    subprocess.run([python, "-c", f"import {(ENVIRONMENTS | HOSTS)[name]}"], check=True)
    (target / _DONE).write_text(pins(name), encoding="utf-8")
    return f"made in {time.perf_counter() - began:.0f} s"


def _is_made(target: Path, name: str) -> bool:
    done = target / _DONE
    return done.is_file() and done.read_text(encoding="utf-8") == pins(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR, help="default: .bench-env below the repository root")
    args = parser.parse_args()
    failed = 0
    for name in ENVIRONMENTS | HOSTS:
        try:
            done = make(args.dir, name)
        except subprocess.CalledProcessError as error:
            done, failed = f"FAILED: exit code {error.returncode} of {' '.join(error.cmd)}", 1
        print(f"{name} {pinned_version(name)}: {done}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
