"""Fine-tune a pool of MiniLMs, make uniform, greedy and pruned soups at the command line, and compare them.

    python examples/text/run.py [--seed 0] [--runs 9] [--workers 2] [--threads 2] [--out DIR]

What is finished is kept: run it again after an interruption, and it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: threads that wait shall sleep

import numpy as np
import torch
from data import Split, load_split
from evaluate import accuracy, predict
from model import load_network
from torch import Tensor
from train import add_options, output_folder, read_training, train_pool

SPLITS = ("validation", "test")
COLUMNS = ("learning_rate", "epochs", "weight_decay", "label_smoothing", "dropout", "seed")
HEADINGS = ("lr", "epochs", "decay", "smooth", "dropout", "seed")
Scores = dict[str, float]


def streamsoup(*arguments: str | Path) -> None:
    """Run the command line of streamsoup and show what it does."""
    command = [sys.executable, "-m", "streamsoup", *map(str, arguments)]
    print("\n$", shlex.join(["streamsoup", *command[3:]]), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def make_greedy_soup(folders: list[Path], soup: Path, own_scores: Path, *flags: str, threads: int) -> None:
    """Make a greedy or pruned soup by validation accuracy, or go on with it."""
    work = soup.with_name(soup.name + ".work")  # where streamsoup keeps scores and sums unless told otherwise
    if soup.exists():
        return
    if (work / "greedy.json").exists():
        streamsoup("greedy", "--resume", work)
        return
    scorer = shlex.join([sys.executable, str(Path(__file__).with_name("evaluate.py"))])
    score = f"{scorer} --model {{soup}} --split validation --threads {threads}"
    streamsoup("greedy", *folders, "--score", score, "--order", own_scores, "-o", soup, *flags)


def logits_of(folder: Path, splits: dict[str, Split], cache: Path) -> dict[str, Tensor]:
    """Return the logits of a checkpoint on each split; they are kept, as they take tens of seconds."""
    if not cache.exists() or cache.stat().st_mtime < (folder / "model.safetensors").stat().st_mtime:
        network = load_network(folder)
        cache.parent.mkdir(exist_ok=True)
        partial = cache.with_name(f"partial-{os.getpid()}.npz")
        np.savez(partial, **{name: predict(network, split).numpy() for name, split in splits.items()})
        os.replace(partial, cache)
    with np.load(cache) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in splits}


def print_runs(folders: list[Path], scores: list[Scores]) -> None:
    """Print one line a run: its hyper-parameters and its accuracy on both splits."""
    print("\nrun    " + "".join(f"{heading:>9}" for heading in HEADINGS) + f"{'validation':>13}{'test':>8}")
    for folder, score in zip(folders, scores, strict=True):
        training = read_training(folder)
        cells = "".join(f"{training[column]:>9.4g}" for column in COLUMNS)
        print(f"{folder.name:<7}{cells}{score['validation']:>13.2f}{score['test']:>8.2f}")


def print_summary(rows: list[tuple[str, Scores]]) -> None:
    """Print the lines that are compared with each other."""
    print(f"\n{'accuracy in per cent':<30}{'validation':>12}{'test':>8}")
    for label, score in rows:
        print(f"{label:<30}{score['validation']:>12.2f}{score['test']:>8.2f}")


def kept_in(soup: Path) -> int:
    """Return how many ingredients a soup has."""
    return len(json.loads((soup / "streamsoup.json").read_text(encoding="utf-8"))["ingredients"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a pool of MiniLMs and make their soups.")
    add_options(parser)
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of each evaluation")
    options = parser.parse_args()
    out = output_folder(options)
    torch.set_num_threads(options.threads)

    began = time.perf_counter()
    folders = train_pool(out, seed=options.seed, runs=options.runs, workers=options.workers)
    trained = time.perf_counter()

    splits = {name: load_split(name) for name in SPLITS}

    def logits(folder: Path) -> dict[str, Tensor]:
        return logits_of(folder, splits, out / "logits" / f"{folder.name}.npz")

    def score(outputs: dict[str, Tensor]) -> Scores:
        return {name: accuracy(outputs[name], split.labels) for name, split in splits.items()}

    outputs = [logits(folder) for folder in folders]
    scores = [score(each) for each in outputs]
    print_runs(folders, scores)
    own_scores = out / "validation.json"
    named = {folder.name: each["validation"] for folder, each in zip(folders, scores, strict=True)}
    own_scores.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    scored = time.perf_counter()

    soups = {name: out / f"{name}-of-{len(folders)}" for name in ("uniform", "greedy", "pruned")}
    if not soups["uniform"].exists():
        streamsoup("soup", *folders, "-o", soups["uniform"])
    make_greedy_soup(folders, soups["greedy"], own_scores, threads=options.threads)
    make_greedy_soup(folders, soups["pruned"], own_scores, "--prune", threads=options.threads)
    cooked = time.perf_counter()

    best = max(range(len(scores)), key=lambda index: scores[index]["validation"])  # the first of equals
    ensemble = {name: torch.stack([each[name] for each in outputs]).mean(dim=0) for name in SPLITS}
    rows = [
        ("start (linear probe)", score(logits(out / "start"))),
        (f"mean of {len(folders)} runs", {name: sum(each[name] for each in scores) / len(scores) for name in SPLITS}),
        (f"best on validation ({folders[best].name})", scores[best]),
        *((f"{name} soup ({kept_in(soup)} kept)", score(logits(soup))) for name, soup in soups.items()),
        (f"ensemble ({len(folders)} networks)", score(ensemble)),
    ]
    print_summary(rows)
    if kept_in(soups["greedy"]) == 1:
        print("\nGreedy kept only the best run: no other helped it on the validation documents.")
    print(
        f"\ntraining {trained - began:.0f} s, scoring the runs {scored - trained:.0f} s, "
        f"making the soups {cooked - scored:.0f} s"
    )


if __name__ == "__main__":
    main()
