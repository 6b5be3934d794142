"""`python -m stllava.train.train_mem_dpo ...`: the original's script of that name; `stllava dpo ...`."""

from __future__ import annotations

import sys

from stllava.cli import main

if __name__ == "__main__":
    sys.exit(main(["dpo", *sys.argv[1:]]))
