"""`python -m cupyflash`."""

import os
import sys

from ._program import main

if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, say) has seen enough; the interpreter must not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # what the shell reports for SIGPIPE
    sys.exit(code)
