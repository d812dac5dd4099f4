"""``python -m openmm_tsf``: the same program as ``openmm-tsf``."""

import sys

from openmm_tsf.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
