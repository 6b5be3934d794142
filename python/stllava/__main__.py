"""`python -m stllava`: the command `stllava`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
