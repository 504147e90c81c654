"""`python -m longtrain`: the same as the command `longtrain`."""

import sys

from longtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
