"""Train a pool, make its uniform and its greedy soup with streamsoup, and compare.

python examples/digits/run.py [--seed 0] [--out DIR] [--runs 12] [--start strong|weak|separate]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from data import load_split
from evaluate import accuracy, predict
from model import load_network
from torch import Tensor
from train import add_options, pool_options, train_pool

import streamsoup

SPLITS = ("validation", "test")
COLUMNS = ("learning_rate", "weight_decay", "label_smoothing", "mixup", "augmentation", "epochs")
HEADINGS = ("lr", "decay", "smooth", "mixup", "augment", "epochs")


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


def mean_score(scores: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each split's accuracies."""
    return {split: sum(score[split] for score in scores) / len(scores) for split in SPLITS}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a pool of digits networks and make their soup.")
    add_options(parser)
    options = parser.parse_args()
    out, keywords = pool_options(options)

    began = time.perf_counter()
    folders = train_pool(out, **keywords)
    trained = time.perf_counter()
    soup = out / f"soup-of-{len(folders)}"
    make_soup(folders, soup, norm=options.norm)
    cooked = time.perf_counter()
    greedy_soup = out / f"greedy-soup-of-{len(folders)}"
    make_greedy_soup(folders, greedy_soup, norm=options.norm)
    chosen = time.perf_counter()
    kept = len(json.loads((greedy_soup / "streamsoup.json").read_text(encoding="utf-8"))["ingredients"])

    splits = {split: load_split(split) for split in SPLITS}

    def outputs(folder: Path) -> dict[str, Tensor]:
        network = load_network(folder)
        return {split: predict(network, images) for split, (images, _) in splits.items()}

    def score(logits: dict[str, Tensor]) -> dict[str, float]:
        return {split: accuracy(logits[split], labels) for split, (_, labels) in splits.items()}

    logits = [outputs(folder) for folder in folders]
    scores = [score(each) for each in logits]
    # The first of equals: max() keeps it, and the test accuracy has no say.
    best = max(range(len(scores)), key=lambda index: scores[index]["validation"])
    ensemble = {split: torch.stack([each[split] for each in logits]).mean(dim=0) for split in SPLITS}

    print_runs(folders, scores)
    rows = [] if options.start == "separate" else [("start", score(outputs(out / "start")))]
    rows += [
        (f"mean of {len(folders)} runs", mean_score(scores)),
        (f"best on validation ({folders[best].name})", scores[best]),
        ("uniform soup", score(outputs(soup))),
        (f"greedy soup ({kept} kept)", score(outputs(greedy_soup))),
        (f"ensemble ({len(folders)} networks)", score(ensemble)),
    ]
    print_summary(rows)
    if kept == 1:
        print("\nGreedy kept only the best run: no other helped it on the validation images.")
    print(f"\ntraining {trained - began:.0f} s, soup {cooked - trained:.1f} s, greedy soup {chosen - cooked:.1f} s")
    print(f"uniform soup: {soup}\ngreedy soup:  {greedy_soup}")


if __name__ == "__main__":
    main()
