"""What the learned soups of digits are learned by, as a task for the command line:

    cd examples/digits
    streamsoup learn --task learn_task:task out/seed0-strong-group/runs/* -o learned --epochs 25 --patience 5

The coefficients are learned on 200 of the 300 validation images; the loss on the other 100 says when to stop. The
network is in evaluation mode, as it is when it is judged: with ``norm="batch"`` its running statistics are those of
the ingredients, mixed like the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from data import load_split
from model import DigitsNet
from torch import Tensor
from torch.nn import functional

LEARNING_IMAGES = 200
BATCH_SIZE = 50


class LearnTask(NamedTuple):
    """All that `streamsoup.learn` needs beside the ingredients."""

    module: DigitsNet
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: list[tuple[Tensor, Tensor]]
    held_out: list[tuple[Tensor, Tensor]]


def task(norm: str = "group") -> LearnTask:
    """Return network, loss and validation images, which lie in a random order."""
    images, labels = load_split("validation")
    learning = zip(images[:LEARNING_IMAGES].split(BATCH_SIZE), labels[:LEARNING_IMAGES].split(BATCH_SIZE), strict=True)
    held_out = [(images[LEARNING_IMAGES:], labels[LEARNING_IMAGES:])]
    return LearnTask(DigitsNet(norm=norm).eval(), functional.cross_entropy, list(learning), held_out)
