"""Learns mixing coefficients of checkpoints, streamed or with all of them in memory, and prints figures as JSON.

    python benchmarks/learned_driver.py network|streamed|memory [--by model|layer] [--steps 3] CHECKPOINT ...

The network is all parameters and next to no arithmetic: what is timed is what learning adds to a training step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

import streamsoup
from streamsoup.budget import PeakSampler
from streamsoup.layers import layer_name


class Parameters(nn.Module):
    """A network that has the tensors of a checkpoint; its logits are a weighted sum of their means."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: list[str] = []
        with safetensors.safe_open(path / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118
                self.names.append(name)
                place: nn.Module = self
                *parents, leaf = name.split(".")
                for part in parents:
                    if not hasattr(place, part):
                        place.add_module(part, nn.Module())
                    place = getattr(place, part)
                shape = file.get_slice(name).get_shape()
                place.register_parameter(leaf, nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, float32 (n, 2)."""
        total = torch.stack([attrgetter(name)(self).mean().float() for name in self.names]).sum()
        return inputs * total


def batches() -> list[tuple[Tensor, Tensor]]:
    """One batch of two examples."""
    return [(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([0, 0]))]


def streamed(paths: Sequence[Path], by: str, steps: int, budget: str) -> dict[str, Any]:
    """Learn with streamsoup."""
    module = Parameters(paths[0])
    result = streamsoup.learn(
        paths, module, nn.functional.cross_entropy, batches(), by=by, epochs=steps, budget_bytes=budget
    )
    timed = result.steps[1:] or result.steps
    return {
        "step_seconds": statistics.median(s.seconds - s.network_seconds for s in timed),
        "network_seconds": statistics.median(s.network_seconds for s in timed),
        "bytes_a_step": timed[0].bytes_read,
        "above_module_bytes": result.measured_peak_bytes,
        "projected_peak_bytes": result.projected_peak_bytes,
    }


def network_alone(paths: Sequence[Path], steps: int) -> dict[str, Any]:
    """Only take gradients of the network: what learning owns beside is above this."""
    module = Parameters(paths[0])
    with PeakSampler() as sampler:
        for _ in range(steps):
            module.zero_grad(set_to_none=True)
            ((inputs, targets),) = batches()
            nn.functional.cross_entropy(module(inputs), targets).backward()
        sampler.sample()
    return {"step_seconds": 0.0, "above_module_bytes": sampler.peak_bytes}


def in_memory(paths: Sequence[Path], by: str, steps: int) -> dict[str, Any]:
    """Learn as the published code does: all ingredients in memory, autograd through their weighted sum."""
    module = Parameters(paths[0])
    groups = {name: "model" if by == "model" else layer_name(name) for name in module.names}
    row_of = {group: row for row, group in enumerate(dict.fromkeys(groups.values()))}
    with PeakSampler() as sampler:
        held = []
        for path in paths:
            with safetensors.safe_open(path / "model.safetensors", "pt") as file:
                held.append({name: file.get_tensor(name).clone() for name in module.names})
        raw = nn.Parameter(torch.zeros(len(row_of), len(paths)))
        beta = nn.Parameter(torch.ones(()))
        optimizer = torch.optim.AdamW([raw, beta], lr=0.1, weight_decay=0.0)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            alphas = raw.softmax(dim=1).to(torch.bfloat16)
            mixed = {
                name: sum(alphas[row_of[groups[name]], i] * tensors[name] for i, tensors in enumerate(held))
                for name in module.names
            }
            ((inputs, targets),) = batches()
            logits = torch.func.functional_call(module, mixed, (inputs,))
            loss = nn.functional.cross_entropy(logits * beta, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
            del mixed, logits, loss
        sampler.sample()
    return {"step_seconds": statistics.median(seconds[1:] or seconds), "above_module_bytes": sampler.peak_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("network", "streamed", "memory"))
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--by", choices=("model", "layer"), default="model")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--budget", default="256MiB")
    args = parser.parse_args()
    if args.how == "streamed":
        found = streamed(args.checkpoints, args.by, args.steps, args.budget)
    elif args.how == "network":
        found = network_alone(args.checkpoints, args.steps)
    else:
        found = in_memory(args.checkpoints, args.by, args.steps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
