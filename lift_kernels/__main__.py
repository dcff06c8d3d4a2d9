"""``python -m lift_kernels``: see `lift_kernels.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
