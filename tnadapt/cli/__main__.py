"""`python -m tnadapt.cli` is the command `tnadapt`."""

import sys

from tnadapt.cli import main

sys.exit(main())
