"""Learned soups: mixing coefficients found by gradient descent, without holding the ingredients."""

from streamsoup.learning.cooking import learn
from streamsoup.learning.job import LearnResult, StepRecord

__all__ = ["LearnResult", "StepRecord", "learn"]
