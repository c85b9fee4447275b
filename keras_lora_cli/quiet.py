"""Silence about what is no news: the processors that TensorFlow found, or did not.

Two of its lines are written when it is imported, by C++ code that heeds no setting.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def lower_log_level() -> None:
    """Leave out all of TensorFlow's log but fatal errors, unless the user chose a level."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Within the context the process, its C++ code included, writes nothing to standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
