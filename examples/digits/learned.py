"""Learned soups of digits beside all others, over pools of several seeds, and which differences may be noise.

    python examples/digits/learned.py [--seeds 0 1 2 3 4] [--runs 12] [--start strong|weak|separate] [--out DIR]

One row is there as a measure: the uniform soup, all of its weights trained on the images by which the coefficients of
the learned soups were found.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: threads that wait shall sleep

import torch
from data import load_split
from evaluate import predict
from learn_task import task
from model import load_network
from run import SPLITS, Logits, make_soups, outputs_of, print_notes
from train import add_options, pool_options, train_pool

sys.path.append(str(Path(__file__).parents[1]))
from judging import TRAINED, correct_in, print_means, print_pairs, train_on


def trained_outputs(soup: Path, norm: str) -> Logits:
    """Return what a soup answers once it was trained on the images of the learned soups."""
    network = load_network(soup)
    train_on(network, task(norm), learning_rate=1e-3, epochs=25, patience=5)
    return {split: predict(network, load_split(split)[0]) for split in SPLITS}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare learned soups with the others over pools of several seeds.")
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(1)
    labels = {split: load_split(split)[1] for split in SPLITS}
    parent, pools = options.out, []
    for seed in options.seeds:
        options.seed = seed
        options.out = parent and parent / f"seed{seed}"
        out, keywords = pool_options(options)
        folders = train_pool(out, **keywords)
        print(f"\n{out.name}", flush=True)
        soups = make_soups(folders, out, norm=options.norm)
        print_notes(soups)
        outputs = outputs_of(folders, soups)
        trained = {TRAINED: trained_outputs(soups["soup"], options.norm)}
        pools.append(correct_in(outputs.runs, outputs.methods | trained, labels))
    names = [f"seed {seed}" for seed in options.seeds]
    print_means(pools, names)
    print_pairs(pools, names)


if __name__ == "__main__":
    main()
