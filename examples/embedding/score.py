"""A greedy soup scored by a callable, and by a command: any program that prints a number.

python examples/embedding/score.py
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import streamsoup

EVALUATOR = """
import json, sys
from safetensors.torch import load_file
weight = load_file(sys.argv[1])["weight"]
print(json.dumps({"results": {"error": float((weight - 1).square().mean())}}))
"""


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"run{i}.safetensors" for i in range(4)]
        for path, noise in zip(paths, (0.5, 0.6, 0.7, 9.0), strict=True):
            save_file({"weight": 1 + noise * torch.randn(5000)}, path)

        class Module(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(5000))

        module = Module().requires_grad_(False)

        def score(candidate: streamsoup.Candidate) -> float:
            candidate.load_into(module)  # no file: straight into the live module
            return -float((module.weight - 1).square().mean())

        one = streamsoup.greedy(paths, folder / "called", score=score)
        print("by a callable:", [Path(member.path).stem for member in one.members])

        (folder / "evaluate.py").write_text(EVALUATOR, encoding="utf-8")
        command = f"{shlex.quote(sys.executable)} {shlex.quote(str(folder / 'evaluate.py'))} {{soup_file}}"
        other = streamsoup.greedy(
            paths,
            folder / "commanded",
            score=command,
            metric="results.error",
            minimize=True,
            workdir=folder / "work",  # a command reads files: candidates are written there
        )
        print("by a command: ", [Path(member.path).stem for member in other.members])
        assert one.members == other.members
        soups = [load_file(folder / kind / "model.safetensors")["weight"] for kind in ("called", "commanded")]
        assert torch.equal(*soups)


if __name__ == "__main__":
    main()
