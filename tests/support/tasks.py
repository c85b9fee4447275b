"""Tasks in SavedModels, answered by TensorFlow's C library in one process for all tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from tensorflow.core.protobuf import config_pb2
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig

import keras_lora as kl
from support import processes
from support.models import randomize_adapters

TEXTS = ["the good film!", "A bad FILMS", "", "good " * 20, "žluťoučký kůň"]
NAMES = ["poor", "fair", "good"]

Arrays = dict[str, Any]

# Answers many requests in one process, which loads TensorFlow's library once.
SERVICE = """
import sys, numpy as np
sys.path.insert(0, "examples")
from run_saved_model import SavedModel, save
for line in sys.stdin:
    path, inputs, outputs, signature, times, *config = line.split()
    try:
        model = SavedModel(path, bytes.fromhex("".join(config)))
        for _ in range(int(times)):
            answers = model.run(dict(np.load(inputs)), signature)
        save(outputs, answers)
        print("answered", flush=True)
    except Exception as error:
        print(repr(error), flush=True)
"""


# A first answer of `generate` takes half as long where TensorFlow computes no constants beforehand.
# Answers in default settings: those to text and padded prompts, of samplers, and of classifiers.
UNFOLDED = config_pb2.ConfigProto()
UNFOLDED.graph_options.rewrite_options.constant_folding = RewriterConfig.OFF


class Service:
    """The C library in a process of its own; XLA is off there."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def answer(
        self,
        path: Path,
        feeds: Arrays,
        signature: str = "serving_default",
        times: int = 1,
        config: config_pb2.ConfigProto | None = None,
    ) -> Arrays:
        """The answer in the settings of a session, the default ones if none are given."""
        inputs, outputs = self._folder / "in.npz", self._folder / "out.npz"
        np.savez(inputs, **feeds)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        settings = "" if config is None else config.SerializeToString().hex()
        request = f"{path} {inputs} {outputs} {signature} {times} {settings}"
        print(request, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line == "answered\n":
                return dict(np.load(outputs))
            if "Error(" in line:
                raise RuntimeError(line)
        raise RuntimeError("The service has ended.")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    process = processes.start(processes.blocking("keras", "keras_lora") + SERVICE)
    yield Service(process, tmp_path_factory.mktemp("service"))
    process.communicate(timeout=60)
    assert process.returncode == 0


def adapted(model: keras.Model, rank: int = 2) -> keras.Model:
    model = kl.apply_lora(model, kl.LoRAConfig(rank=rank, alpha=3))
    randomize_adapters(model)
    return model


def bytes_of(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
