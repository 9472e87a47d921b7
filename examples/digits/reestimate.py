"""Re-estimate the BatchNorm statistics of one checkpoint, in place, on the 200 training images.

    python examples/digits/reestimate.py --model PATH

Averaged weights have other activations than any ingredient, so averaged statistics fit none of them. Give this to
`streamsoup greedy --before-score` to run it on each candidate before it is scored, and on the soup that is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import load_split
from model import load_network
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description="Re-estimate the BatchNorm statistics of a checkpoint, in place.")
    parser.add_argument("--model", type=Path, required=True, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = load_network(options.model)
    layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over all batches
    images, _ = load_split("finetune")
    network.train()
    with torch.inference_mode():
        for batch in images.split(50):
            network(batch)
    path = options.model / "model.safetensors" if options.model.is_dir() else options.model
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path, {"format": "pt"})
    print(f"re-estimated {len(layers)} layers")


if __name__ == "__main__":
    main()
