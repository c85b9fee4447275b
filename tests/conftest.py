"""Settings for every test: quiet, on the CPU, and the same numbers in each run."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# Small models take longer to compile than to run: XLA compiles them without optimizations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import gc
import random

import numpy as np
import pytest

# A failed assertion in `support` shows its values, as in a test.
pytest.register_assert_rewrite("support")
# `support` has no tests or doctests, and some of its modules import optional packages.
collect_ignore = ["support"]
# `devices` asks for JAX with several of them: `make test-backends`.
if os.environ["KERAS_BACKEND"] != "jax":
    collect_ignore.append("devices")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed the generators that Keras takes its seeds from, on every backend.

    TensorFlow's own seed is not set again: that drops all its kernels, and about once in ten
    thousand times the process aborts.
    """
    random.seed(7)
    np.random.seed(7)


def pytest_collection_finish() -> None:
    """Seed, and let no collection of garbage visit what was imported, some 400,000 objects.

    The process of `-n` that hands out the tests collects none, and imports no Keras: here alone.
    """
    import keras  # noqa: PLC0415

    keras.utils.set_random_seed(7)
    gc.collect()
    gc.freeze()
