"""Is it cheaper to read the few kept ingredients again than to build and read a running sum?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

MOST_READS = 2  # of any ingredient, beyond its own scoring


class ReadPlanner:
    """Chooses for each trial, from forecast bytes read and written, between the running sum and the ingredients.

    The choice depends on the trials before it alone, and not on what this process did of them: a run that is resumed
    makes the same candidates, bit for bit, also where sums are rounded (float32).

    Parameters
    ----------
    nbytes : mapping of path to int
        Bytes of each ingredient.
    sum_bytes : int
        Of the running sum.
    """

    def __init__(self, nbytes: Mapping[str, int], sum_bytes: int) -> None:
        self.reads: Counter[str] = Counter()
        self._nbytes = nbytes
        self._sum_bytes = sum_bytes
        self._summed: tuple[str, ...] = ()

    def copy(self) -> ReadPlanner:
        """Return a planner that has seen the same trials, to look ahead with."""
        other = ReadPlanner(self._nbytes, self._sum_bytes)
        other.reads, other._summed = self.reads.copy(), self._summed
        return other

    def reread(self, kept: Sequence[str], tried: str, *, may_reread: bool = True) -> bool:
        """Whether to make the next candidate from its ingredients; counts what is read either way.

        Parameters
        ----------
        kept : sequence of paths
            The current soup.
        tried : path
        may_reread : bool
            False where a candidate can be made from the sum only.

        Notes
        -----
        Reading again never makes an ingredient be read more than twice in all: with k ingredients kept and many trials
        that would be the k reads a trial that running sums are there to avoid.
        """
        members = tuple(kept)
        new = [path for path in members if path not in self._summed]
        grows = self._summed == members[: len(self._summed)]
        to_sum = new if grows else list(members)
        # Building: read what is not summed, and for each addition to a sum read and write that.
        additions = len(to_sum) if grows and self._summed else min(1, len(to_sum))
        build = sum(self._nbytes[p] for p in to_sum) + self._sum_bytes * additions * (1 if not self._summed else 2)
        by_sum = build + self._sum_bytes
        again = sum(self._nbytes[p] for p in members)
        # One more read of each will be needed: for the sum of later trials, or for the soup that is written at the end.
        allowed = may_reread and all(self.reads[p] + 2 <= MOST_READS for p in members) and bool(to_sum)
        chosen = allowed and again < by_sum
        for path in members if chosen else to_sum:
            self.reads[path] += 1
        if not chosen:
            self._summed = members
        self.reads[tried] += 1
        return chosen
