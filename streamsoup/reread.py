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
    trials_left: int,
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
    trials_left : int
        After this one. If there are any, a sum will have to be built some time, which is one more read of each.

    Notes
    -----
    Reading again never makes an ingredient be read more than twice in all: with k ingredients kept and many trials that
    would be the k reads a trial that running sums are there to avoid.
    """
    if sum_ready:
        return False
    later = 1 if trials_left else 0
    if any(reads.get(path, 0) + 1 + later > MOST_READS for path in kept_bytes):
        return False
    again = sum(kept_bytes.values())
    build_and_read = again + 2 * sum_bytes
    return again < build_and_read
