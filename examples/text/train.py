"""Train the shared start, a linear probe on the pretrained network, and fine-tune a pool of runs from it.

    python examples/text/train.py --out DIR [--seed 0] [--runs 9] [--workers 2]

Writes ``DIR/start/`` and ``DIR/runs/run1/`` ..., folders as `transformers` writes them. Finished folders are kept, so
a stopped training goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from data import group_names, load_split
from fit import PROBE_DECAY, Hyperparameters, draw_pool, fit, probe
from model import TRAINING_NAME, load_network, load_pretrained, save_network


def train_pool(out: Path, *, seed: int = 0, runs: int = 9, workers: int = 2) -> list[Path]:
    """Train what is missing and return the folders of the runs.

    Parameters
    ----------
    out
        Folder that receives ``start/`` and ``runs/``.
    seed
        Decides everything that is drawn: hyper-parameters, order of documents, dropout. The start is always the same.
    workers
        Processes that train the runs, of one thread each; the result does not depend on their number.
    """
    load_split("train")  # tokenised here, not by every worker
    folders = [out / "runs" / f"run{number + 1}" for number in range(runs)]
    jobs = [(folder, hyper, out / "start") for folder, hyper in zip(folders, draw_pool(seed, runs), strict=True)]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the processes below inherit it
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        executor.submit(_train_start, out / "start").result()
        waiting = [job for job in jobs if not _is_finished(job[0], job[1]._asdict())]
        waiting.sort(key=lambda job: -job[1].epochs)  # longest first: the workers then end at nearly the same time
        for done in as_completed([executor.submit(_train_run, *job) for job in waiting]):
            print(f"  trained {done.result().name}", flush=True)
    return folders


def read_training(folder: Path) -> dict[str, Any]:
    """Return the hyper-parameters of a finished run."""
    training: dict[str, Any] = json.loads((folder / TRAINING_NAME).read_text(encoding="utf-8"))
    return training


def _is_finished(folder: Path, training: dict[str, Any]) -> bool:
    if not folder.exists():
        return False
    if read_training(folder) != training:
        raise SystemExit(f"{folder}: trained with other options. Choose another --out or remove it.")
    return True


def _train_start(folder: Path) -> None:
    training = {"probe_decay": PROBE_DECAY}
    if _is_finished(folder, training):
        return
    torch.set_num_threads(1)
    network = load_pretrained(len(group_names()))
    probe(network, load_split("train"))
    save_network(network, training, folder)
    print(f"  trained {folder.name}", flush=True)


def _train_run(folder: Path, hyper: Hyperparameters, start: Path) -> Path:
    torch.set_num_threads(1)
    network = load_network(start)
    fit(network, load_split("train"), hyper)
    save_network(network, hyper._asdict(), folder)
    return folder


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``train.py`` and ``run.py`` share."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=9, metavar="N")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that train")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: examples/text/out/seed0")


def output_folder(options: argparse.Namespace) -> Path:
    """Return the folder that receives everything."""
    out: Path | None = options.out
    default = Path(__file__).parent / "out" / f"seed{options.seed}"
    return out or Path(os.path.relpath(default))  # short, since the commands are shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a start and a pool of fine-tuned runs.")
    add_options(parser)
    options = parser.parse_args()
    train_pool(output_folder(options), seed=options.seed, runs=options.runs, workers=options.workers)


if __name__ == "__main__":
    main()
