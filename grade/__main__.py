"""`python -m grade`, the same as the console script; also what `accelerate launch -m grade` starts."""

import sys

from grade.cli import main

if __name__ == "__main__":
    sys.exit(main())
