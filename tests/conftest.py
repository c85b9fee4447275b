"""Settings for every test: quiet, on the CPU, and the same numbers in each run."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import random
from collections.abc import Iterator

import keras
import numpy as np
import pytest
from support import servers

keras.utils.set_random_seed(7)
# No tests and no doctests, and to import some of its modules takes what tests do without.
collect_ignore = ["support"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What Keras draws its seeds from, on every backend.

    To seed TensorFlow anew drops all its kernels, and once in some ten thousand times the process
    aborts in it.
    """
    random.seed(7)
    np.random.seed(7)


@pytest.fixture(scope="session", params=[servers.STANDIN, servers.REAL])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[servers.Server]:
    with servers.started(request.param, tmp_path_factory.mktemp("models")) as running:
        yield running
