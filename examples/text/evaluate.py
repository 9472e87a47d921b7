"""Print the accuracy of one checkpoint, in per cent, as the last line: the scorer of the greedy soups.

python examples/text/evaluate.py --model FOLDER [--split validation|test]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: threads that wait shall sleep

import torch
from data import Split, load_split
from model import Classifier, load_network
from torch import Tensor


def predict(network: Classifier, split: Split) -> Tensor:
    """Return the logits, float32 (n, 20), with the network in evaluation mode."""
    network.eval()
    logits = torch.empty(len(split.labels), network.classifier.out_features)
    with torch.inference_mode():
        for rows in split.batches(50):
            logits[rows] = network(split.take(rows).tokens)
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest logit is at the label, in per cent, to four places."""
    return round(100.0 * (logits.argmax(dim=1) == labels).double().mean().item(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the accuracy of one checkpoint in per cent.")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    split = load_split(options.split)
    print(f"{accuracy(predict(load_network(options.model), split), split.labels):.4f}")


if __name__ == "__main__":
    main()
