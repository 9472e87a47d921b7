"""Write the tables of README and docs/ from benchmarks/results/*.json; with --check, only say whether they agree.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "scaling.md")
_PLACE = re.compile(r"(<!-- bench:(?P<case>[a-z-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def render(case: str) -> str:
    """Make the table of one case."""
    result = json.loads((HERE / "results" / f"{case}.json").read_text(encoding="utf-8"))
    module = importlib.import_module(f"case_{case.replace('-', '_')}")
    machine = result["machine"]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"load {machine['load_average']:.1f}, {result['when'][:10]}"
    )
    if hasattr(module, "markdown"):  # too wide a table for two columns
        return "\n".join([f"**{case}**: {where}.", *module.markdown(result["figures"])]) + "\n"
    rows = module.table(result["figures"])
    lines = [f"| {case} | {where} |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    return "\n".join(lines) + "\n"


def fill(text: str) -> str:
    """Fill every place for a table."""
    return _PLACE.sub(lambda match: f"{match[1]}{render(match['case'])}{match[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = False
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if text != filled and args.check:
            print(
                f"{page.name} does not agree with benchmarks/results: run python benchmarks/tables.py", file=sys.stderr
            )
            stale = True
        elif text != filled:
            page.write_text(filled, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
