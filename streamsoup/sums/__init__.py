"""Running sums, in memory or in a zarr store, in whole generations."""

from streamsoup.sums.running import Member, RunningSoup, merge

__all__ = ["Member", "RunningSoup", "merge"]
