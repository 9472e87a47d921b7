"""Print the accuracy of one checkpoint, in per cent, as the last line: a scorer for greedy soups.

    python examples/digits/evaluate.py --model PATH [--split validation|test]

PATH is a folder with safetensors files, or one such file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import load_split
from model import DigitsNet, load_network
from torch import Tensor


def predict(network: DigitsNet, images: Tensor) -> Tensor:
    """Return the logits, float32 (n, 10), with the network in evaluation mode."""
    network.eval()
    with torch.inference_mode():
        return torch.cat([network(batch) for batch in images.split(500)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest logit is at the label, in per cent."""
    return 100.0 * (logits.argmax(dim=1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the accuracy of one checkpoint in per cent.")
    parser.add_argument("--model", type=Path, required=True, metavar="PATH")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one thread: the score does not depend on the machine's core count
    images, labels = load_split(options.split)
    print(f"{accuracy(predict(load_network(options.model), images), labels):.4f}")


if __name__ == "__main__":
    main()
