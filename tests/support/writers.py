"""Processes that save one of two adapters over the other, and are killed.

They import `without_package` first, since Keras takes seconds to import.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from keras_lora.files import adapter_files as files

ADAPTERS: dict[str, dict[str, np.ndarray]] = {
    "old": {"a": np.full(70_001, 1, "float32"), "b": np.full((3, 5), 1, "float16")},
    "new": {"a": np.full(30_011, 2, "float32"), "c": np.full((7,), 2, "float64")},
}
# The events audited by Python at which saving changes a directory.
STEPS = {"open", "os.rename", "os.remove", "os.mkdir"}


def write(name: str, directory: str) -> None:
    files.write_adapter_files(directory, {"name": name}, ADAPTERS[name], overwrite=True)


def read(directory: str) -> str | None:
    """The name of the adapter, checked to be whole; None if the directory has none."""
    if not Path(directory, files.TENSORS_FILE).exists():
        return None
    loaded = files.read_adapter_files(directory)
    name: str = loaded.config["name"]
    assert loaded.config == {"name": name}
    assert set(loaded.tensors) == set(ADAPTERS[name])
    for key, array in ADAPTERS[name].items():
        np.testing.assert_array_equal(loaded.tensors[key], array, strict=True)
    return name


def die_at_step(step: int) -> None:
    left = iter(range(step))

    def hook(event: str, _: Any) -> None:
        if event in STEPS and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_at_every_step(directory: str) -> None:
    """Save in children that die before their first step, their second, and so on to the end."""
    for name in ("old", "new"):
        for step in itertools.count():
            child = os.fork()
            if child == 0:
                die_at_step(step)
                write(name, directory)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            print(name, "killed" if status == signal.SIGKILL else status, read(directory))
            if status == 0:
                break


def die_at_random_moments(directory: str, times: int) -> None:
    """Save the one and the other in children, each killed within the time that four saves take."""
    assert not {"keras", "tensorflow"} & set(sys.modules)
    began = time.perf_counter()
    for name in ADAPTERS:
        write(name, f"{directory}.timed")
    moments, limit = random.Random(0), 2 * (time.perf_counter() - began)
    for _ in range(times):
        child = os.fork()
        if child == 0:
            for name in itertools.cycle(ADAPTERS):
                write(name, directory)
        time.sleep(moments.uniform(0, limit))
        os.kill(child, signal.SIGKILL)
        print(os.waitpid(child, 0)[1] == signal.SIGKILL, read(directory))
