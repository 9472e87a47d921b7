"""What the machine can do at best: the same bytes read and written by plain calls, with the same threads.

python benchmarks/floor.py warm|buffered|dontcache|direct FILES... --write-bytes N --dir DIR
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from streamsoup.bench.ceilings import mapped_read_seconds, plain_read_seconds, write_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("warm", "buffered", "dontcache", "direct"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write-bytes", type=int, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dir", default=tempfile.gettempdir(), type=Path)
    args = parser.parse_args()
    if args.kind == "warm":
        mapped_read_seconds(args.files[:1], 1)  # compiles
        read = mapped_read_seconds(args.files, args.threads)
        unsynced, synced = write_seconds(args.write_bytes, args.threads, args.dir)
        print(json.dumps({"read_seconds": read, "write_seconds": unsynced, "write_and_sync_seconds": synced}))
    else:

        def write() -> None:
            write_seconds(args.write_bytes, 1, args.dir)

        seconds = plain_read_seconds(args.files, args.threads, mode=args.kind, beside=write)
        print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
