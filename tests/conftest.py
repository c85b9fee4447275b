"""Settings for every test: quiet, on the CPU, and the same numbers in each run."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# Small models take longer to compile than to run: XLA compiles them without optimizations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import random

import keras
import numpy as np
import pytest

keras.utils.set_random_seed(7)
# An assertion that fails in `support` says why, as one in a test does.
pytest.register_assert_rewrite("support")
# No tests and no doctests: to import some of its modules takes packages that most tests do without.
collect_ignore = ["support"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What Keras draws its seeds from, on every backend.

    To seed TensorFlow anew drops all its kernels, and once in some ten thousand times the process
    aborts in it.
    """
    random.seed(7)
    np.random.seed(7)
