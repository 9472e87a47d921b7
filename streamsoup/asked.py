"""A method that was asked what to do with a tensor, and may first want something measured."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from streamsoup.measurement import Asking, begin
from streamsoup.methods.protocol import Coefficients, Elementwise, Measure, Merge, Rule


class Asked:
    """Leads a method through its measurements.

    Parameters
    ----------
    merge : Coefficients, Elementwise, or generator of measures

    Attributes
    ----------
    rule : Coefficients, Elementwise or None
        What it decided; None while it wants `measurement`.
    measurement : SumMeasurement or RankMeasurement
    """

    def __init__(self, merge: Merge | Generator[Measure, Any, Any]) -> None:
        self.rule: Rule | None = None
        self.value: Any = None
        self._steps: Generator[Measure, Any, Any] | None = None
        if isinstance(merge, Coefficients | Elementwise):
            self._decide(merge)
        else:
            self._steps = merge
            self._advance(None)

    @property
    def wants(self) -> bool:
        """Whether there is something to be measured still."""
        return self._steps is not None

    def turn(self) -> None:
        """Go on, after all tiles of a sweep were shown to `measurement`."""
        if not self.measurement.turn():
            self._advance(self.measurement.result)

    def _advance(self, result: Any) -> None:
        assert self._steps is not None
        try:
            self.measurement: Asking = begin(self._steps.send(result))
        except StopIteration as end:
            self._steps = None
            self._decide(end.value)

    def _decide(self, value: Any) -> None:
        self.value = value
        if isinstance(value, Coefficients | Elementwise):
            self.rule = value
