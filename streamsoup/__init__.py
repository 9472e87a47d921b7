"""streamsoup: memory-efficient streaming model soups.

>>> import streamsoup
>>> result = streamsoup.soup(["runs/a", "runs/b"], "soup/")  # doctest: +SKIP

Names are loaded when they are first used: importing the package imports neither torch nor numba nor zarr.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from streamsoup._version import __version__

if TYPE_CHECKING:
    from streamsoup.candidate import Candidate as Candidate
    from streamsoup.comparison import Comparison as Comparison
    from streamsoup.comparison import compare as compare
    from streamsoup.converting import convert as convert
    from streamsoup.cook import resume as resume
    from streamsoup.cook import soup as soup
    from streamsoup.errors import StreamsoupError as StreamsoupError
    from streamsoup.execution import Execution as Execution
    from streamsoup.execution import SoupResult as SoupResult
    from streamsoup.from_mergekit_config import from_mergekit as from_mergekit
    from streamsoup.greedy_cook import greedy as greedy
    from streamsoup.greedy_cook import resume_greedy as resume_greedy
    from streamsoup.greedy_job import GreedyResult as GreedyResult
    from streamsoup.learning import LearnResult as LearnResult
    from streamsoup.learning import learn as learn
    from streamsoup.outcome import Progress as Progress
    from streamsoup.recipe import Ingredient as Ingredient
    from streamsoup.recipe import Recipe as Recipe
    from streamsoup.recipe import read_recipe as read_recipe
    from streamsoup.sliding import sliding_averages as sliding_averages
    from streamsoup.soup_plan import plan_soup as plan_soup
    from streamsoup.sums import RunningSoup as RunningSoup
    from streamsoup.sweeping import sweep as sweep
    from streamsoup.verifying import Verification as Verification
    from streamsoup.verifying import verify as verify
    from streamsoup.view import SoupView as SoupView
    from streamsoup.viewing import open as open

_HOMES = {
    "Candidate": "candidate",
    "Comparison": "comparison",
    "Execution": "execution",
    "GreedyResult": "greedy_job",
    "Ingredient": "recipe",
    "LearnResult": "learning",
    "Progress": "outcome",
    "Recipe": "recipe",
    "RunningSoup": "sums",
    "SoupResult": "execution",
    "SoupView": "view",
    "StreamsoupError": "errors",
    "Verification": "verifying",
    "compare": "comparison",
    "convert": "converting",
    "from_mergekit": "from_mergekit_config",
    "greedy": "greedy_cook",
    "learn": "learning",
    "open": "viewing",
    "plan_soup": "soup_plan",
    "read_recipe": "recipe",
    "resume": "cook",
    "resume_greedy": "greedy_cook",
    "sliding_averages": "sliding",
    "soup": "cook",
    "sweep": "sweeping",
    "verify": "verifying",
}

# `from streamsoup import *` leaves a person's own `open` what it was.
__all__ = ["__version__", *(name for name in _HOMES if name != "open")]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamsoup' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"streamsoup.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
