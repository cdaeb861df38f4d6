"""Train one arm: `python run.py norm=pre_ln dropout=depth_decay`. `python run.py --help` lists what can be chosen."""

import sys

from albert_ablate.training.main import main

if __name__ == "__main__":
    sys.exit(main())
