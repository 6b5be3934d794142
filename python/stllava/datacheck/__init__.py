"""Look at the data before the first hour of training: what is wrong, what the limit would cut, what is a target, what it would cost.

    kinds     the closed list of findings            rows, tokens      one row at a time
    pictures  headers, and pixels on demand          hashes, overlap   what rows, images and files share
    check     all of it -> a report                  estimate          memory and time
    masks     tokens by what they are for            screen, page      for people; the findings as JSON lines
"""

from .check import CheckSettings, Report, check_data
from .kinds import KINDS, Finding

__all__ = ["KINDS", "CheckSettings", "Finding", "Report", "check_data"]
