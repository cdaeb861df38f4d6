"""`python -m albert_ablate`: the command albert-ablate."""

import sys

from albert_ablate.cli import main

sys.exit(main())
