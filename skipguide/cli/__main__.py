"""`python -m skipguide.cli` is the same as `skipguide`."""

import sys

from skipguide.cli import main

if __name__ == "__main__":
    sys.exit(main())
