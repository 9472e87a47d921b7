"""Learned soups of MiniLMs beside all others, over pools of several seeds, and which differences may be noise.

    python examples/text/learned.py [--seeds 0] [--runs 9] [--workers 2] [--threads 2] [--out DIR]

One row is there as a measure: the uniform soup, all of its weights trained on the messages by which the coefficients
of the learned soups were found. What is finished is kept: run it again after an interruption, and it goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: threads that wait shall sleep

import torch
from data import load_split
from learn_task import task
from model import load_network, save_network
from run import SPLITS, logits_of, outputs_of, print_notes
from train import add_options, output_folder, train_pool

sys.path.append(str(Path(__file__).parents[1]))
from judging import TRAINED, correct_in, print_means, print_pairs, train_on

TRAINING = {"learning_rate": 1e-4, "epochs": 5, "patience": 2}


def train_soup(soup: Path, trained: Path) -> None:
    """Train a soup on the messages of the learned soups."""
    if trained.exists():
        return
    print(f"\ntraining {trained.name}", flush=True)
    network = load_network(soup)
    train_on(network, task(), **TRAINING)
    save_network(network, TRAINING, trained)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare learned soups with the others over pools of several seeds.")
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of each evaluation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    splits = {name: load_split(name) for name in SPLITS}
    parent, pools = options.out, []
    for seed in options.seeds:
        options.seed = seed
        options.out = parent and parent / f"seed{seed}"
        out = output_folder(options)
        folders = train_pool(out, seed=seed, runs=options.runs, workers=options.workers)
        print(f"\n{out}", flush=True)
        outputs, soups = outputs_of(folders, out, pruned=False, threads=options.threads)
        print_notes(soups)
        trained = out / f"trained-of-{len(folders)}"
        train_soup(soups["uniform"], trained)
        logits = logits_of(trained, splits, out / "logits" / f"{trained.name}.npz")
        labels = {name: split.labels for name, split in splits.items()}
        pools.append(correct_in(outputs.runs, outputs.methods | {TRAINED: logits}, labels))
    names = [f"seed {seed}" for seed in options.seeds]
    print_means(pools, names)
    print_pairs(pools, names)


if __name__ == "__main__":
    main()
