"""Merge with mergekit, as its commands do; runs in mergekit's environment.

    python tests/mergekit_driver.py JOBS.json

JOBS is a list of [configuration, output folder, command, seed]; the last line of the output is a list: for each job
null, or why it failed.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge


def merge(config: str, out: str, command: str, seed: int) -> None:
    document = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    options = MergeOptions(quiet=True, copy_tokenizer=False, lazy_unpickle=True, random_seed=seed)
    if command == "mergekit-yaml":
        run_merge(MergeConfiguration.model_validate(document), out, options)
        return
    import transformers
    from mergekit.graph import Executor

    transformers.trainer_utils.set_seed(seed)
    raw = RawPyTorchMergeConfig.model_validate(document)
    Executor(plan_flat_merge(raw, out, False, False, options), math_device="cpu").execute()


def main() -> None:
    logging.disable(logging.CRITICAL)
    found = []
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            merge(*job)
            found.append(None)
        except Exception as error:  # whatever it is, the test says it
            found.append(f"{type(error).__name__}: {error}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
