"""Averages in a training loop, without a file: live states go into a running sum; and a soup that is cancelled.

python examples/embedding/training.py
"""

from __future__ import annotations

import logging
import tempfile
from collections import deque
from pathlib import Path

import torch

import streamsoup
from streamsoup.hosts.averaged_model import AveragedModel


class CancelledError(Exception):
    """Our own: whatever a callback raises comes out of the call as it is."""


def main() -> None:
    logging.getLogger("streamsoup").setLevel(logging.INFO)  # it logs, and never prints
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    inputs = torch.randn(512, 8)
    targets = inputs.sin().sum(1, keepdim=True)

    latest = streamsoup.RunningSoup(network)  # names and dtypes of the module; nothing is added yet
    window: deque[dict[str, torch.Tensor]] = deque()
    swa = AveragedModel(network)  # the same protocol as torch.optim.swa_utils.AveragedModel
    for step in range(200):
        batch = torch.randint(0, 512, (32,))
        loss = (network(inputs[batch]) - targets[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 100 and step % 10 == 9:
            swa.update_parameters(network)
            window.append({key: tensor.clone() for key, tensor in network.state_dict().items()})
            latest.add(window[-1])  # folded in when this returns; nothing of it is kept but the sum
            if len(window) > 5:
                latest.remove(window.popleft())  # the very numbers that were added
    average = latest.mean().tensors()
    print(f"average of the latest {len(latest.members)}, {len(average)} tensors; exact: {latest.mean().is_exact}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        latest.mean().save(folder / "latest")  # durable, with a manifest that says what it is
        latest.mean().load_into(network)
        paths = [latest.mean().save(folder / f"run{i}") for i in range(3)]

        def cancel(progress: streamsoup.Progress) -> None:
            raise CancelledError

        try:
            streamsoup.soup(paths, folder / "soup", progress=cancel)
        except CancelledError:
            print("cancelled; what was finished is kept:", (folder / "soup.partial").exists())
        if (folder / "soup.partial").exists():
            streamsoup.resume(folder / "soup")
        else:
            streamsoup.soup(paths, folder / "soup")
        with streamsoup.open(folder / "soup") as soup:
            assert torch.equal(soup["0.weight"], network.state_dict()["0.weight"])


if __name__ == "__main__":
    main()
