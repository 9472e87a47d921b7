"""The linear probe, the hyper-parameters of a run, and its training loop."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from data import Split
from model import Classifier
from torch import Tensor, nn
from torch.nn import functional

PROBE_DECAY = 1e-3


class Hyperparameters(NamedTuple):
    """What distinguishes one run from another."""

    seed: int
    epochs: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    dropout: float
    batch_size: int


def draw_pool(seed: int, runs: int) -> list[Hyperparameters]:
    """Draw hyper-parameters at random; a longer pool starts with the shorter one."""
    draw = np.random.default_rng([seed, 1])
    return [
        Hyperparameters(
            seed=1000 * (seed + 1) + number,
            epochs=int(draw.choice([1, 2, 2, 3])),
            learning_rate=float(f"{5e-5 * 5 ** draw.random():.3g}"),
            weight_decay=float(f"{10 ** draw.uniform(-4, -1):.3g}"),
            label_smoothing=float(draw.choice([0.0, 0.05, 0.1, 0.2])),
            dropout=float(draw.choice([0.0, 0.1, 0.2])),
            batch_size=16,
        )
        for number in range(runs)
    ]


def probe(network: Classifier, split: Split) -> None:
    """Train the head alone, in place, on the features of the network as it is: logistic regression by L-BFGS."""
    network.eval()
    features = torch.empty(len(split.labels), network.classifier.in_features)
    with torch.no_grad():
        for rows in split.batches(50):
            features[rows] = network.features(split.take(rows).tokens)
    head = network.classifier
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(head(features), split.labels) + PROBE_DECAY * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def fit(network: Classifier, split: Split, hyper: Hyperparameters) -> None:
    """Train in place with AdamW: a tenth of the steps rising, then falling to zero in a line.

    The word embeddings (half of all parameters) stay as they were pretrained, and so are equal in all runs.
    """
    torch.manual_seed(hyper.seed)  # decides the order of the documents and what dropout leaves out
    network.embeddings.word_embeddings.requires_grad_(False)
    network.pooler.requires_grad_(False)
    network.set_dropout(hyper.dropout)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=hyper.learning_rate, weight_decay=hyper.weight_decay, fused=True)
    steps_per_epoch = len(split.labels) // hyper.batch_size
    steps = hyper.epochs * steps_per_epoch
    network.train()
    for step in range(steps):
        if step % steps_per_epoch == 0:
            batches = torch.randperm(len(split.labels)).split(hyper.batch_size)
        batch = split.take(batches[step % steps_per_epoch])
        rate = hyper.learning_rate * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        logits = network(batch.tokens)
        functional.cross_entropy(logits, batch.labels, label_smoothing=hyper.label_smoothing).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    network.eval()
