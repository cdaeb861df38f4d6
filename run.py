"""Train one arm: `python run.py norm=pre_ln dropout=depth_decay`. `python run.py --help` lists what can be chosen."""

import sys


def main() -> int:
    from albert_ablate.training.main import command

    return command()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before there is anything to stop
        sys.exit(130)
