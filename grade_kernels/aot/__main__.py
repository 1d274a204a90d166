"""`python -m grade_kernels.aot`."""

import os
import sys

from grade_kernels.aot.command import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
