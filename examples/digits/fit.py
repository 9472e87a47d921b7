"""One training run: hyper-parameters, augmentation and the loop."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from model import CLASSES, DigitsNet
from torch import Tensor, nn
from torch.nn import functional


class Hyperparameters(NamedTuple):
    """What distinguishes one run from another."""

    seed: int
    epochs: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    mixup: float
    augmentation: float
    batch_size: int


PRETRAINING = Hyperparameters(
    seed=0,
    epochs=20,
    learning_rate=2e-3,
    weight_decay=0.05,
    label_smoothing=0.0,
    mixup=0.0,
    augmentation=1.0,
    batch_size=64,
)


def draw_pool(seed: int, runs: int, *, from_scratch: bool = False) -> list[Hyperparameters]:
    """Draw hyper-parameters at random; a longer pool starts with the shorter one.

    Training from scratch takes larger and more steps than fine-tuning, so its ranges are higher.
    """
    low, high = (3e-3, 2e-2) if from_scratch else (5e-4, 3e-3)
    epochs = (20, 40) if from_scratch else (15, 30)
    draw = np.random.default_rng([seed, 1])
    return [
        Hyperparameters(
            seed=1000 * (seed + 1) + number,
            epochs=int(draw.integers(epochs[0], epochs[1] + 1)),
            learning_rate=float(f"{low * (high / low) ** draw.random():.3g}"),
            weight_decay=float(f"{10 ** draw.uniform(-4, -1):.3g}"),
            label_smoothing=float(draw.choice([0.0, 0.05, 0.1, 0.2])),
            mixup=float(draw.choice([0.0, 0.0, 0.2, 0.4])),
            augmentation=float(draw.choice([0.5, 0.75, 1.0])),
            batch_size=32,
        )
        for number in range(runs)
    ]


def fit(network: DigitsNet, images: Tensor, labels: Tensor, hyper: Hyperparameters) -> None:
    """Train in place with AdamW: a tenth of the steps rising, then a cosine to zero."""
    order = torch.Generator().manual_seed(hyper.seed)
    draw = np.random.default_rng(hyper.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=hyper.learning_rate, weight_decay=hyper.weight_decay)
    steps_per_epoch = len(images) // hyper.batch_size  # the incomplete last batch is left out
    steps = hyper.epochs * steps_per_epoch
    targets = functional.one_hot(labels, CLASSES).float()
    targets = targets * (1 - hyper.label_smoothing) + hyper.label_smoothing / CLASSES
    network.train()
    for step in range(steps):
        if step % steps_per_epoch == 0:
            batches = torch.randperm(len(images), generator=order).split(hyper.batch_size)
        chosen = batches[step % steps_per_epoch]
        inputs, wanted = deform(images[chosen], hyper.augmentation, order), targets[chosen]
        if hyper.mixup:
            inputs, wanted = mix(inputs, wanted, float(draw.beta(hyper.mixup, hyper.mixup)))
        progress = step / steps
        rate = hyper.learning_rate * min(1.0, progress * 10) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(network(inputs), wanted).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval()


def deform(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Turn (by up to 0.35 rad), scale (15 %), shear (0.2) and shift (one pixel) at random; 0 does nothing."""
    if strength == 0:
        return images
    turn, scale, shear, right, down = strength * (2 * torch.rand(5, len(images), generator=generator) - 1)
    turn, scale = 0.35 * turn, 1 + 0.15 * scale
    across = torch.stack([scale * turn.cos(), 0.2 * shear - turn.sin(), 0.25 * right], dim=1)
    along = torch.stack([turn.sin(), scale * turn.cos(), 0.25 * down], dim=1)
    grid = functional.affine_grid(torch.stack([across, along], dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def mix(images: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Blend every image and target with those of the next one in the (shuffled) batch."""
    return torch.lerp(images.roll(1, 0), images, share), torch.lerp(targets.roll(1, 0), targets, share)
