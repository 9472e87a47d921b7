"""What the learned soups of MiniLMs are learned by, as a task for the command line:

    cd examples/text
    streamsoup learn --task learn_task:task out/seed0/runs/* -o out/seed0/learned --epochs 5 --patience 2

The coefficients are learned on 400 of the 600 validation messages; the other 200 say when to stop. The network is in
evaluation mode: what is learned is to be good without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from data import Split, group_names, load_split
from model import Classifier, load_pretrained
from torch import Tensor
from torch.nn import functional

LEARNING_MESSAGES = 400
BATCH_SIZE = 50


class LearnTask(NamedTuple):
    """All that `streamsoup.learn` needs beside the ingredients."""

    module: Classifier
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: list[tuple[Tensor, Tensor]]
    held_out: list[tuple[Tensor, Tensor]]


def task() -> LearnTask:
    """Return network, loss and validation messages."""
    rows = torch.arange(len(load_split("validation").labels)).split(LEARNING_MESSAGES)  # they lie in a random order
    learning, held_out = (_batches(load_split("validation").take(part)) for part in rows)
    return LearnTask(load_pretrained(len(group_names())).eval(), functional.cross_entropy, learning, held_out)


def _batches(split: Split) -> list[tuple[Tensor, Tensor]]:
    return [tuple(split.take(rows)) for rows in split.batches(BATCH_SIZE)]
