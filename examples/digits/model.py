"""A small convolutional network for 8x8 digits, and the way it is written to and read from disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIDE = 8
CLASSES = 10


class DigitsNet(nn.Module):
    """Classify grey images of 8x8 pixels: five convolutions, a learned offset per pixel, mean pooling.

    Parameters
    ----------
    width
        Channels of the first convolution, a multiple of 8; the last has four times as many.
    norm
        ``"group"`` (8 groups, no running statistics: its weights may be averaged as they are) or ``"batch"``
        (whose running statistics have to be estimated anew after averaging).
    """

    position_ids: Tensor

    def __init__(self, width: int = 32, norm: str = "group") -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.position_embedding = nn.Embedding(SIDE * SIDE, width)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        # The one int64 tensor: equal in every run, so a soup has to carry it over untouched.
        self.register_buffer("position_ids", torch.arange(SIDE * SIDE))
        self.stem_norm = _norm(norm, width)
        self.blocks = nn.Sequential(
            _block(width, 2 * width, stride=2, norm=norm),
            _block(2 * width, 2 * width, stride=1, norm=norm),
            _block(2 * width, 4 * width, stride=2, norm=norm),
            _block(4 * width, 4 * width, stride=1, norm=norm),
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float32 (n, 10), of images, float32 (n, 1, 8, 8) in [0, 1]."""
        offsets = self.position_embedding(self.position_ids).T.reshape(1, -1, SIDE, SIDE)
        features = torch.relu(self.stem_norm(self.stem(images) + offsets))
        return self.head(self.blocks(features).mean(dim=(2, 3)))


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(8, channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    raise ValueError(f"norm is {kind!r}, but only 'group' and 'batch' are known")


def _block(inputs: int, outputs: int, *, stride: int, norm: str) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, _norm(norm, outputs), nn.ReLU())


def network_of(tensors: Mapping[str, Tensor]) -> DigitsNet:
    """Build the network that these tensors belong to (width and norm are read off them) and load them."""
    norm = "batch" if "stem_norm.running_mean" in tensors else "group"
    network = DigitsNet(width=tensors["stem.weight"].shape[0], norm=norm)
    network.load_state_dict(dict(tensors))
    return network.eval()


def load_network(path: Path) -> DigitsNet:
    """Load a network from a safetensors file, or from a folder that holds one or several of them."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: no *.safetensors file in this folder")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return network_of(tensors)


def save_network(network: DigitsNet, config: Mapping[str, Any], folder: Path) -> None:
    """Write ``model.safetensors`` and ``config.json``; the folder appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(network.state_dict(), partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder)
