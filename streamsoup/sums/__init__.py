"""Running sums, in memory or in a zarr store, in whole generations."""

from streamsoup.sums.members import Member, merge
from streamsoup.sums.running import RunningSoup

__all__ = ["Member", "RunningSoup", "merge"]
