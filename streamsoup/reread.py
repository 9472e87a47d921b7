"""Is it cheaper to read the few kept ingredients again than to build and read a running sum?"""

from __future__ import annotations

from collections.abc import Mapping

MOST_READS = 2  # of any ingredient, beyond its own scoring


def prefer_reread(
    kept_bytes: Mapping[str, int],
    reads: Mapping[str, int],
    *,
    sum_bytes: int,
    sum_ready: bool,
) -> bool:
    """Choose for the next trial, from forecast bytes read and written.

    Parameters
    ----------
    kept_bytes : mapping of path to int
        Bytes of the ingredients in the current soup.
    reads : mapping of path to int
        How often each was read so far.
    sum_bytes : int
        Of the running sum.
    sum_ready : bool
        Whether the sum is that of the current soup already.

    Notes
    -----
    Reading again never makes an ingredient be read more than twice in all: with k ingredients kept and many trials that
    would be the k reads a trial that running sums are there to avoid.
    """
    if sum_ready:
        return False
    # One more read of each will be needed: for the sum of later trials, or for the soup that is written at the end.
    if any(reads.get(path, 0) + 2 > MOST_READS for path in kept_bytes):
        return False
    again = sum(kept_bytes.values())
    build_and_read = again + 2 * sum_bytes
    return again < build_and_read
