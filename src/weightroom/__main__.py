"""``python -m weightroom`` is the command line."""

import sys

from weightroom.cli import main

if __name__ == "__main__":
    sys.exit(main())
