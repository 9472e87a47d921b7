"""Train a pool, make its uniform, greedy and learned soups with streamsoup, and compare.

python examples/digits/run.py [--seed 0] [--out DIR] [--runs 12] [--start strong|weak|separate]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch is imported: its threads shall sleep while those of streamsoup work. When they spun, a step of a
# learned soup took 280 ms beside other work, and 44 ms like this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from data import load_split
from evaluate import accuracy, predict
from learn_task import task
from model import load_network
from torch import Tensor
from train import add_options, pool_options, train_pool

import streamsoup

SPLITS = ("validation", "test")
COLUMNS = ("learning_rate", "weight_decay", "label_smoothing", "mixup", "augmentation", "epochs")
HEADINGS = ("lr", "decay", "smooth", "mixup", "augment", "epochs")
SOUPS = {
    "soup": "uniform soup",
    "greedy-soup": "greedy soup",
    "learned-soup": "learned soup",
    "learned-soup-by-layer": "learned soup by layer",
    "polished-soup": "polished greedy soup",
}
Logits = dict[str, Tensor]


def make_soup(folders: list[Path], soup: Path, *, norm: str) -> None:
    """Average the folders with the command line of streamsoup; a soup that is there is kept."""
    if soup.exists():
        return
    command = [sys.executable, "-m", "streamsoup", "soup", *map(str, folders), "-o", str(soup)]
    if norm == "batch":
        command += ["--buffers", "first"]  # the runs differ in num_batches_tracked, which evaluation never reads
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def make_greedy_soup(folders: list[Path], soup: Path, *, norm: str) -> None:
    """Keep what does not lower the validation accuracy; each candidate is streamed straight into one live network."""
    if soup.exists():
        return
    network = load_network(folders[0])
    images, labels = load_split("validation")

    def score(candidate: streamsoup.Candidate) -> float:
        candidate.load_into(network)
        return accuracy(predict(network, images), labels)

    streamsoup.greedy(folders, soup, score=score, buffers="first" if norm == "batch" else "identical")


def make_learned_soup(folders: list[Path], soup: Path, *, norm: str, **options: Any) -> None:
    """Learn mixing coefficients on validation images: 25 epochs, fewer if five in a row bring nothing."""
    if soup.exists():
        return
    given = task(norm)
    streamsoup.learn(
        folders,
        given.module,
        given.loss,
        given.batches,
        soup,
        held_out=given.held_out,
        epochs=25,
        patience=5,
        buffers="first" if norm == "batch" else "identical",
        **options,
    )


def make_soups(folders: list[Path], out: Path, *, norm: str) -> dict[str, Path]:
    """Make all soups of a pool, and return their folders; those that are there are kept."""
    soups = {name: out / f"{name}-of-{len(folders)}" for name in SOUPS}
    make_soup(folders, soups["soup"], norm=norm)
    make_greedy_soup(folders, soups["greedy-soup"], norm=norm)
    make_learned_soup(folders, soups["learned-soup"], norm=norm)
    make_learned_soup(folders, soups["learned-soup-by-layer"], norm=norm, by="layer")
    kept = weights_in(soups["greedy-soup"])
    if len(kept) > 1:
        init = [kept.get(folder.name, 0.0) for folder in folders]
        make_learned_soup(folders, soups["polished-soup"], norm=norm, init=init, restrict=True)
    else:
        soups["polished-soup"] = soups["greedy-soup"]  # a single run: there is nothing to mix
    return soups


def weights_in(soup: Path) -> dict[str, float]:
    """Return the ingredients of a soup by name, and their weights."""
    ingredients = json.loads((soup / "streamsoup.json").read_text(encoding="utf-8"))["ingredients"]
    return {Path(each["path"]).name: each["weight"] for each in ingredients}


class PoolOutputs(NamedTuple):
    """What the networks of a pool answer."""

    runs: list[Logits]
    methods: dict[str, Logits]
    """By the names under which they are compared."""


def outputs_of(folders: list[Path], soups: dict[str, Path]) -> PoolOutputs:
    """Return the logits of runs, soups and ensemble on both splits."""
    runs = [logits_of(folder) for folder in folders]
    labels = load_split("validation")[1]
    own = [accuracy(each["validation"], labels) for each in runs]
    methods = {
        "best on validation": runs[own.index(max(own))],  # the first of equals; the test accuracy has no say
        **{SOUPS[name]: logits_of(soup) for name, soup in soups.items()},
        "ensemble": {split: torch.stack([each[split] for each in runs]).mean(dim=0) for split in SPLITS},
    }
    return PoolOutputs(runs, methods)


def logits_of(folder: Path) -> Logits:
    """Return what a checkpoint answers, by split."""
    network = load_network(folder)
    return {split: predict(network, load_split(split)[0]) for split in SPLITS}


def print_runs(folders: list[Path], scores: list[dict[str, float]]) -> None:
    """Print one line a run: its hyper-parameters and its accuracy on both splits."""
    print("run    " + "".join(f"{heading:>9}" for heading in HEADINGS) + f"{'validation':>13}{'test':>8}")
    for folder, score in zip(folders, scores, strict=True):
        training = json.loads((folder / "config.json").read_text(encoding="utf-8"))["training"]
        cells = "".join(f"{training[column]:>9.3g}" for column in COLUMNS)
        print(f"{folder.name:<7}{cells}{score['validation']:>13.2f}{score['test']:>8.2f}")


def print_summary(rows: list[tuple[str, dict[str, float]]]) -> None:
    """Print the lines that are compared with each other."""
    print(f"\n{'accuracy in per cent':<30}{'validation':>12}{'test':>8}")
    for label, score in rows:
        print(f"{label:<30}{score['validation']:>12.2f}{score['test']:>8.2f}")


def print_notes(soups: dict[str, Path]) -> None:
    """Print when the learned soups were best, and what streamsoup has to say about them."""
    for name, soup in soups.items():
        record = soup / "learned.json"
        if record.exists():
            learned = json.loads(record.read_text(encoding="utf-8"))
            print(f"\n{SOUPS[name]}: best after {learned['best_step']} of {len(learned['steps'])} steps")
            for note in learned["notes"]:
                print(f"  {note}")


def mean_score(scores: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each split's accuracies."""
    return {split: sum(score[split] for score in scores) / len(scores) for split in SPLITS}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a pool of digits networks and make their soups.")
    add_options(parser)
    options = parser.parse_args()
    out, keywords = pool_options(options)
    torch.set_num_threads(1)  # the same bits on any number of cores; more make so small a network no faster

    began = time.perf_counter()
    folders = train_pool(out, **keywords)
    trained = time.perf_counter()
    soups = make_soups(folders, out, norm=options.norm)
    cooked = time.perf_counter()
    outputs = outputs_of(folders, soups)
    labels = {split: load_split(split)[1] for split in SPLITS}

    def score(logits: Logits) -> dict[str, float]:
        return {split: accuracy(logits[split], labels[split]) for split in SPLITS}

    scores = [score(each) for each in outputs.runs]
    print_runs(folders, scores)
    kept = len(weights_in(soups["greedy-soup"]))
    rows = [] if options.start == "separate" else [("start", score(logits_of(out / "start")))]
    rows += [(f"mean of {len(folders)} runs", mean_score(scores))]
    rows += [(name, score(logits)) for name, logits in outputs.methods.items()]
    print_summary(rows)
    print(f"\nThe greedy soup keeps {kept} of {len(folders)} runs.")
    if kept == 1:
        print("Greedy kept only the best run: no other helped it on the validation images.")
    print("Greedy and learned soups were made with the validation images: there they look better than they are.")
    print_notes(soups)
    print(f"\ntraining {trained - began:.0f} s, soups {cooked - trained:.1f} s")
    print("\n".join(f"{SOUPS[name] + ':':<23}{soup}" for name, soup in soups.items()))


if __name__ == "__main__":
    main()
