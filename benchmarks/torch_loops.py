"""What people write by hand: whole checkpoints in memory, float32 sums.

    python benchmarks/torch_loops.py uniform OUT CHECKPOINTS...
    python benchmarks/torch_loops.py greedy-reload OUT CHECKPOINTS... --scores S1,S2,...   (DiWA-style)
    python benchmarks/torch_loops.py greedy-update OUT CHECKPOINTS... --scores S1,S2,...   (the reference repository's)

The greedy loops get a trivial score: a list of numbers, one for each trial; a trial is accepted if its number is not 0.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def load(path: str) -> State:
    return load_file(f"{path}/model.safetensors")


def average(paths: list[str]) -> State:
    """Load each, add in float32, divide, cast back."""
    total: State = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in paths:
        for name, tensor in load(path).items():
            dtypes[name] = tensor.dtype
            if name in total:
                total[name] += tensor.float()
            else:
                total[name] = tensor.float()
    return {name: (tensor / len(paths)).to(dtypes[name]) for name, tensor in total.items()}


def greedy_reload(paths: list[str], accepted: list[bool]) -> State:
    """Average all kept files anew for each candidate."""
    kept = paths[:1]
    soup = load(paths[0])
    for path, accept in zip(paths[1:], accepted, strict=True):
        candidate = average([*kept, path])
        if accept:
            kept.append(path)
            soup = candidate
    return soup


def greedy_update(paths: list[str], accepted: list[bool]) -> State:
    """Update the average incrementally, in the checkpoints' dtype."""
    soup, count = load(paths[0]), 1
    for path, accept in zip(paths[1:], accepted, strict=True):
        new = load(path)
        candidate = {
            name: tensor.clone() * (count / (count + 1.0)) + new[name].clone() * (1.0 / (count + 1))
            for name, tensor in soup.items()
        }
        if accept:
            soup, count = candidate, count + 1
    return soup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("uniform", "greedy-reload", "greedy-update"))
    parser.add_argument("out")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--scores", default="")
    args = parser.parse_args()
    accepted = [text != "0" for text in args.scores.split(",") if text]
    if args.what == "uniform":
        soup = average(args.checkpoints)
    else:
        soup = (greedy_reload if args.what == "greedy-reload" else greedy_update)(args.checkpoints, accepted)
    save_file(soup, args.out)


if __name__ == "__main__":
    main()
