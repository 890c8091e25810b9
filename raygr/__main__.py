"""`python -m raygr`, the same as the command `raygr`."""

import sys

from raygr.cli import main

if __name__ == "__main__":
    sys.exit(main())
