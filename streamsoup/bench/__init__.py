"""Ceilings of this machine, and the engine against them."""

from __future__ import annotations

from streamsoup.bench.report import BenchReport, Spread
from streamsoup.bench.run import BenchOptions, run_bench

__all__ = ["BenchOptions", "BenchReport", "Spread", "run_bench"]
