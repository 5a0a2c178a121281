"""`python -m qllm` is the command `qllm`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
