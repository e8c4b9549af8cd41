"""Makes ``python -m deepcore`` the same as the ``deepcore`` command."""

import sys

from deepcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
