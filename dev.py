#!/usr/bin/env python3
"""Make a virtual environment with pinned packages and run one thing in it. Needs Python 3.11 or newer, nothing else.

python3 dev.py demo     fine-tune a pool of small classifiers on real digits, and soup them
python3 dev.py test     the tests
python3 dev.py check    lint and types
python3 dev.py examples the other examples
python3 dev.py slow     the tests that take minutes
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
COMMANDS: dict[str, tuple[str, list[list[str]]]] = {
    "demo": ("examples", [["python", "examples/digits/run.py"]]),
    "test": ("test", [["pytest", "-n", "2"]]),
    "check": (
        "dev",
        [
            ["ruff", "format", "--check", "."],
            ["ruff", "check", "."],
            ["mypy", "-p", "streamsoup"],
            ["mypy", "kernels"],
        ],
    ),
    "examples": (
        "examples",
        [
            ["python", "examples/digits/learned.py", "--seeds", "0", "--runs", "3", "--start", "weak"],
            *(["python", f"examples/embedding/{path.name}"] for path in sorted(ROOT.glob("examples/embedding/*.py"))),
        ],
    ),
    "slow": ("test", [["pytest", "-n", "2", "-m", "slow"]]),
}


def main() -> int:
    """Run a command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the last step")
    parser.add_argument("--venv", default=ROOT / ".venv", type=Path, help="where the environment is (.venv)")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - this script must say so, whatever runs it
        parser.exit(1, f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}.\n")
    extra, steps = COMMANDS[args.command]
    install(args.venv, extra)
    environment = {**os.environ, "PATH": f"{args.venv.resolve() / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    for number, step in enumerate(steps, 1):
        command = step + (args.arguments if number == len(steps) else [])
        print("$", " ".join(command), flush=True)
        program = str(args.venv.resolve() / "bin" / command[0])
        code = subprocess.run([program, *command[1:]], cwd=ROOT, env=environment, check=False).returncode
        if code:
            return code
    return 0


def install(folder: Path, extra: str) -> None:
    """Make the environment and install streamsoup with an extra, unless that was done already."""
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes())
    stamp = folder / f"installed-{extra}"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted.hexdigest():
        return
    if not (folder / "bin" / "python").exists():
        print(f"Making a virtual environment in {folder} ...", flush=True)
        venv.create(folder, with_pip=True)
    print("Installing pinned packages (torch is the large one; the first time takes minutes) ...", flush=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch alone first: asked for through a range it might come in another build than the pinned one.
    torch = next(line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line[:5] == "torch")
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "-c", "constraints.txt", "-e", f".[{extra}]"], cwd=ROOT, check=True)
    stamp.write_text(wanted.hexdigest(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
