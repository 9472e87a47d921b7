"""Fine-tune a pool of MiniLMs, make uniform, greedy, pruned and learned soups, and compare them.

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
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: threads that wait shall sleep

import numpy as np
import torch
from data import Split, load_split
from evaluate import accuracy, predict
from learn_task import task
from model import load_network
from torch import Tensor
from train import add_options, output_folder, read_training, train_pool

from streamsoup import learn

SPLITS = ("validation", "test")
COLUMNS = ("learning_rate", "epochs", "weight_decay", "label_smoothing", "dropout", "seed")
HEADINGS = ("lr", "epochs", "decay", "smooth", "dropout", "seed")
SOUPS = {
    "uniform": "uniform soup",
    "greedy": "greedy soup",
    "pruned": "pruned soup",
    "learned": "learned soup",
    "learned-by-layer": "learned soup by layer",
    "polished": "polished greedy soup",
}
Logits = dict[str, Tensor]
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


def make_learned_soup(folders: list[Path], soup: Path, **options: Any) -> None:
    """Learn coefficients on validation messages, or go on with it: at most 5 epochs, fewer if two bring nothing."""
    if soup.exists():
        return
    print(f"\nlearning {soup.name}", flush=True)
    given = task()
    learn(
        folders,
        given.module,
        given.loss,
        given.batches,
        soup,
        held_out=given.held_out,
        epochs=5,
        patience=2,
        workdir=soup.with_name(soup.name + ".work"),
        on_step=lambda step: print(f"  step {step.step}, loss {step.loss:.3f}, {step.seconds:.1f} s", flush=True),
        **options,
    )


def make_soups(folders: list[Path], out: Path, own_scores: Path, *, pruned: bool, threads: int) -> dict[str, Path]:
    """Make all soups of a pool, and return their folders: those that are there are kept."""
    soups = {name: out / f"{name}-of-{len(folders)}" for name in SOUPS if pruned or name != "pruned"}
    if not soups["uniform"].exists():
        streamsoup("soup", *folders, "-o", soups["uniform"])
    make_greedy_soup(folders, soups["greedy"], own_scores, threads=threads)
    if pruned:
        make_greedy_soup(folders, soups["pruned"], own_scores, "--prune", threads=threads)
    make_learned_soup(folders, soups["learned"])
    make_learned_soup(folders, soups["learned-by-layer"], by="layer")
    kept = weights_in(soups["greedy"])
    if len(kept) > 1:
        init = [kept.get(folder.name, 0.0) for folder in folders]
        make_learned_soup(folders, soups["polished"], init=init, restrict=True)
    else:
        soups["polished"] = soups["greedy"]  # nothing to mix
    return soups


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


def weights_in(soup: Path) -> dict[str, float]:
    """Return the ingredients of a soup by name, and their weights."""
    ingredients = json.loads((soup / "streamsoup.json").read_text(encoding="utf-8"))["ingredients"]
    return {Path(each["path"]).name: each["weight"] for each in ingredients}


def print_notes(soups: dict[str, Path]) -> None:
    """Print what streamsoup has to say about the soups that were learned, and when they were best."""
    for name in ("learned", "learned-by-layer", "polished"):
        record = soups[name] / "learned.json"
        if record.exists():  # there is none where the greedy soup is a single run
            learned = json.loads(record.read_text(encoding="utf-8"))
            print(f"\n{SOUPS[name]}: best after {learned['best_step']} of {len(learned['steps'])} steps")
            for note in learned["notes"]:
                print(f"  {note}")


class PoolOutputs(NamedTuple):
    """What the networks of a pool answer, by split."""

    runs: list[Logits]
    methods: dict[str, Logits]
    """By the names under which they are compared."""


def outputs_of(folders: list[Path], out: Path, *, pruned: bool, threads: int) -> tuple[PoolOutputs, dict[str, Path]]:
    """Make the soups of a pool; return the outputs of runs, soups and ensemble, and the folders of the soups."""
    splits = {name: load_split(name) for name in SPLITS}

    def logits(folder: Path) -> Logits:
        return logits_of(folder, splits, out / "logits" / f"{folder.name}.npz")

    runs = [logits(folder) for folder in folders]
    own = [accuracy(each["validation"], splits["validation"].labels) for each in runs]
    own_scores = out / "validation.json"
    named = {folder.name: score for folder, score in zip(folders, own, strict=True)}
    own_scores.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    soups = make_soups(folders, out, own_scores, pruned=pruned, threads=threads)
    methods = {
        "best on validation": runs[own.index(max(own))],  # the first of equals
        **{SOUPS[name]: logits(soup) for name, soup in soups.items()},
        "ensemble": {name: torch.stack([each[name] for each in runs]).mean(dim=0) for name in SPLITS},
    }
    return PoolOutputs(runs, methods), soups


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
    outputs, soups = outputs_of(folders, out, pruned=True, threads=options.threads)
    cooked = time.perf_counter()

    splits = {name: load_split(name) for name in SPLITS}

    def score(logits: Logits) -> Scores:
        return {name: accuracy(logits[name], split.labels) for name, split in splits.items()}

    scores = [score(each) for each in outputs.runs]
    print_runs(folders, scores)
    start = logits_of(out / "start", splits, out / "logits" / "start.npz")
    kept = {SOUPS[name]: f" ({len(weights_in(soups[name]))} kept)" for name in ("greedy", "pruned")}
    print_summary(
        [
            ("start (linear probe)", score(start)),
            (f"mean of {len(folders)} runs", {s: sum(each[s] for each in scores) / len(scores) for s in SPLITS}),
            *((label + kept.get(label, ""), score(logits)) for label, logits in outputs.methods.items()),
        ]
    )
    print_notes(soups)
    if len(weights_in(soups["greedy"])) == 1:
        print("\nGreedy kept only the best run: no other helped it on the validation documents.")
    print(f"\ntraining {trained - began:.0f} s, scoring the runs and making the soups {cooked - trained:.0f} s")


if __name__ == "__main__":
    main()
