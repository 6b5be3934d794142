"""`python -m stllava.train.train_mem ...`: the original's script of that name; `stllava sft ...`."""

from __future__ import annotations

import sys

from stllava.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
