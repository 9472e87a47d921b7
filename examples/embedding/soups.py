"""streamsoup inside another program: soups, running sums and greedy soups from Python, in a second.

python examples/embedding/soups.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import streamsoup


def make_fine_tunes(folder: Path, count: int) -> tuple[torch.nn.Module, list[Path]]:
    """Make a small network and checkpoints that differ a little from it."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
    paths = []
    for number in range(count):
        state = {name: t + 0.02 * torch.randn_like(t) for name, t in network.state_dict().items()}
        paths.append(folder / f"run{number}.safetensors")
        save_file(state, paths[-1])
    return network, paths


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network, paths = make_fine_tunes(folder, 4)
        truth = {key: tensor.clone() for key, tensor in network.state_dict().items()}

        # A soup as one call; progress is a callback, errors are streamsoup.StreamsoupError.
        result = streamsoup.soup(paths, folder / "soup.safetensors", weights=[4, 3, 2, 1], budget_bytes="64MiB")
        print(f"soup of {result.ingredients}: {result.bytes_read:,} bytes read, peak {result.measured_peak_bytes:,}")

        # A running soup: add and take out; the mean is always that of its members, bit for bit.
        running = streamsoup.RunningSoup(paths)
        for path in paths:
            running.add(path)
        running.remove(paths[0])
        running.mean().load_into(network)  # straight into the live module
        tensors = running.mean().tensors()  # a mapping; each tensor is made when it is looked up
        assert torch.equal(tensors["0.weight"], network.state_dict()["0.weight"])

        # A greedy soup whose score is any callable.
        def score(candidate: streamsoup.Candidate) -> float:
            candidate.load_into(network)
            return -sum(float((tensor - truth[key]).square().sum()) for key, tensor in network.state_dict().items())

        greedy = streamsoup.greedy(paths, folder / "greedy", score=score)
        print(f"greedy soup kept {len(greedy.members)} of {len(paths)}, score {greedy.score:.3f}")
        written = load_file(folder / "greedy" / "model.safetensors")
        print(f"written: {sorted(written)}")


if __name__ == "__main__":
    main()
