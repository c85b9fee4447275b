"""A built layer that takes other variables than those that it was built with.

Private Keras API in this file, and why (`tests/test_private_api.py` watches it):
    `_tracker`: a built layer is locked, and adapters are added after it was built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras


@contextlib.contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Within the context the layer takes variables, and lets go of them."""
    tracker = layer._tracker
    locked = tracker.locked
    tracker.unlock()
    try:
        yield
    finally:
        if locked:
            tracker.lock()
