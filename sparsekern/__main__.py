"""python -m sparsekern COMMAND, the same as the `sparsekern` script."""

import sys

from sparsekern.cli import main

if __name__ == "__main__":
    sys.exit(main())
