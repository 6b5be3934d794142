"""What the libraries that read medical files say is not heard: their warnings and log records may quote the header."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from stllava.image_source import CATCHING

__all__ = ["silence"]

_LIBRARIES = ("pydicom", "nibabel", "pylibjpeg", "openjpeg", "libjpeg", "rle", "jpeg_ls", "gdcm", "PIL")


@contextmanager
def silence() -> Iterator[None]:
    """For this thread's log records, and the warnings of the process, whose handling is one for all threads; hence one thread at a time."""
    here = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != here

    with CATCHING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] in _LIBRARIES]
        for logger in loggers:
            logger.addFilter(of_others)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(of_others)
