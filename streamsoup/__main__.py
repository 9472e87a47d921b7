"""``python -m streamsoup``."""

import sys

from streamsoup.cli import main

if __name__ == "__main__":
    sys.exit(main())
