"""Methods beside each other on one test set, over several pools: mean accuracies, and which differences may be noise.

Two methods that are right about the same share of examples may still disagree about many. Only the examples about which
one of them is right and the other wrong tell them apart: if neither were better, each would fall to either side with
a chance of one half. That is McNemar's test, here exact (binomial, two-sided).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

SPLITS = ("validation", "test")
TRAINED = "uniform soup, trained"
PAIRS = (
    ("learned soup", "best on validation"),
    ("learned soup", "uniform soup"),
    ("learned soup", "greedy soup"),
    ("learned soup", "ensemble"),
    ("learned soup by layer", "learned soup"),
    ("learned soup by layer", "greedy soup"),
    ("learned soup by layer", "ensemble"),
    ("learned soup by layer", TRAINED),
    ("polished greedy soup", "greedy soup"),
)
Logits = Mapping[str, Tensor]
"""By split, shape (examples, classes)."""
Correct = dict[str, dict[str, npt.NDArray[np.float64]]]
"""Of one pool: method, split, and 1 where the method is right about the example, else 0 (or a share between them)."""


def train_on(network: nn.Module, task: Any, *, learning_rate: float, epochs: int, patience: int) -> None:
    """Train all weights of a soup on the examples by which coefficients are learned, and stop by the same rule.

    A measure of the learned soups: those examples are training data to them too, which the runs have not seen.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)

    def held_out_loss() -> float:
        with torch.no_grad():
            return sum(float(task.loss(network(inputs), targets)) for inputs, targets in task.held_out)

    best, kept, without = held_out_loss(), copy.deepcopy(network.state_dict()), 0
    for _ in range(epochs):
        for inputs, targets in task.batches:
            optimizer.zero_grad()
            task.loss(network(inputs), targets).backward()
            optimizer.step()
        loss, without = held_out_loss(), without + 1
        if loss < best:
            best, kept, without = loss, copy.deepcopy(network.state_dict()), 0
        if without == patience:
            break
    network.load_state_dict(kept)


def correct_in(runs: Sequence[Logits], methods: Mapping[str, Logits], labels: Mapping[str, Tensor]) -> Correct:
    """Return which examples the runs, on average, and each method are right about."""

    def correct(logits: Logits) -> dict[str, npt.NDArray[np.float64]]:
        return {split: (logits[split].argmax(dim=1) == labels[split]).double().numpy() for split in SPLITS}

    each = [correct(logits) for logits in runs]
    mean = {split: np.mean([run[split] for run in each], axis=0) for split in SPLITS}
    return {"mean of the runs": mean, **{name: correct(logits) for name, logits in methods.items()}}


def print_means(pools: Sequence[Correct], names: Sequence[str]) -> None:
    """Print each method's accuracy in per cent: means over the pools, and the test accuracy in each pool."""
    mean_of = f"mean of {len(pools)} pools" if len(pools) > 1 else "one pool"
    print(f"\n{f'per cent, {mean_of}':<30}{'validation':>11}{'test':>8}   test in" + _row(names, 9))
    for method in pools[0]:
        by_split = {split: [100 * pool[method][split].mean() for pool in pools] for split in SPLITS}
        validation, test = (float(np.mean(by_split[split])) for split in SPLITS)
        each = _row([f"{accuracy:.2f}" for accuracy in by_split["test"]], 9)
        print(f"{method:<30}{validation:>11.2f}{test:>8.2f}          {each}")


def print_pairs(pools: Sequence[Correct], names: Sequence[str]) -> None:
    """Print, for pairs of methods, on the test set: the difference in accuracy, and McNemar's test in each pool.

    The pools share their test set: an example that is hard in one is hard in all, so that the counts of the pools must
    not be added up as if they were of different examples. The last column counts each example once, for the method that
    is right about it in more pools. What it tells is about other examples and the same pools. About other pools on the
    same examples the standard error tells, which is that of the mean over pools.
    """
    heading = f"{'test: first against second':<46}{'difference':>11}{'s.e.':>7}   "
    several = len(pools) > 1
    print(f"\n{heading}{_row(names, 15)}" + (f"{'each once':>16}" if several else ""))
    for first, second in PAIRS:
        differences = [pool[first]["test"] - pool[second]["test"] for pool in pools]
        points = [100 * float(each.mean()) for each in differences]
        error = f"{np.std(points, ddof=1) / len(points) ** 0.5:.2f}" if several else "-"
        counts = _row([_mcnemar(each) for each in differences], 15)
        if several:
            counts += f"{_mcnemar(np.sum(differences, axis=0)):>16}"
        print(f"{first + ' / ' + second:<46}{np.mean(points):>+11.2f}{error:>7}   {counts}")
    tests = len(PAIRS) * len(pools)
    print(
        "a:b p    a examples the first alone is right about, b the second alone; p by chance alone, exact, two-sided.\n"
        f"Of {tests} such tests about {0.05 * tests:.1f} fall below 0.05 where there is nothing to find."
    )
    if several:
        print(
            "The pools share the test set, so their counts must not be added up: `each once` counts an example for\n"
            "the method that is right about it in more pools. s.e.: of the difference, over pools."
        )


def _mcnemar(difference: npt.NDArray[np.float64]) -> str:
    first, second = int((difference > 0).sum()), int((difference < 0).sum())
    p = binomtest(first, first + second).pvalue if first + second else 1.0
    return f"{first}:{second} {f'{p:.3f}' if p >= 0.001 else '<.001'}"


def _row(cells: Sequence[str], width: int) -> str:
    return "".join(f"{cell:>{width}}" for cell in cells)
