"""What the examples share: a MiniLM classifier, batches of rows, and a progress bar in `fit`."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assets
import keras
import keras_hub
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import keras_lora as kl

BATCH = 32
# The first steps compile.
WARM_UP = 5

# Sentence embeddings are means over tokens, so this encoder's pooler was never trained for a
# task: it trains in full, as the classifier does.
HEAD = ("pooled_dense", "logits")
CONFIG = kl.LoRAConfig(rank=8, alpha=16, layers_to_save=HEAD)

Features = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Data:
    """Tokenised rows."""

    features: Features
    labels: np.ndarray

    def accuracy(self, logits: np.ndarray) -> float:
        return float(np.mean(np.argmax(logits, axis=-1) == self.labels))


def encoder() -> keras.Model:
    """The pretrained encoder."""
    return keras_hub.models.BertBackbone.from_preset(str(assets.minilm()))


def classifier(classes: int, backbone: keras.Model | None = None) -> keras.Model:
    """A classifier of tokenised rows: the backbone, by default a new encoder, with a new head."""
    backbone = encoder() if backbone is None else backbone
    return keras_hub.models.BertTextClassifier(backbone, classes, preprocessor=None)


def compile_for_training(model: keras.Model) -> None:
    model.compile(
        optimizer=keras.optimizers.Adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # By default Keras leaves XLA off on a CPU, where XLA about halves the time of these steps.
        jit_compile=True,
    )


def preprocessor(length: int) -> keras.layers.Layer:
    """The layer that makes rows of `length` tokens from strings."""
    return keras_hub.models.BertTextClassifierPreprocessor.from_preset(
        str(assets.minilm()), sequence_length=length
    )


def tokenise(rows: assets.Rows, length: int) -> Data:
    features = preprocessor(length)(list(rows.texts))
    return Data(
        {name: np.asarray(x, "int32") for name, x in features.items()}, np.array(rows.labels)
    )


def batches(data: Data, steps: int, seed: int) -> tf.data.Dataset:
    """`steps` batches of rows in a random order; each row comes once before any comes twice."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * BATCH // len(data.labels))
    order = np.concatenate([rng.permutation(len(data.labels)) for _ in range(epochs)])
    order = order[: steps * BATCH]
    features = {name: x[order] for name, x in data.features.items()}
    return tf.data.Dataset.from_tensor_slices((features, data.labels[order])).batch(BATCH)


class Steps(keras.callbacks.Callback):
    """Lowers the learning rate linearly to 0, times each step and moves a progress bar."""

    def __init__(self, rate: float, total: int, progress: Progress, title: str) -> None:
        super().__init__()
        self._rate, self._total, self._progress = rate, total, progress
        self._bar = progress.add_task(title, total=total, loss="compiling")
        self._started = 0.0
        self.seconds: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.model.optimizer.learning_rate = self._rate * (1 - batch / self._total)
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.seconds.append(time.perf_counter() - self._started)
        self._progress.update(self._bar, advance=1, loss=f"loss {logs['loss']:.3f}")

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[WARM_UP:] or self.seconds)


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
    )


def argument_parser(documentation: str | None, steps: int) -> argparse.ArgumentParser:
    """A parser with the options that every example has."""
    parser = argparse.ArgumentParser(description=(documentation or "").splitlines()[0])
    parser.add_argument("--steps", type=positive, default=steps, help=f"of {BATCH} rows; {steps}")
    parser.add_argument("--out", type=Path, help="keep the files in this folder")
    return parser


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, received {text}")
    return number


@contextlib.contextmanager
def output_folder(path: Path | None) -> Iterator[Path]:
    """The folder at `path`, or a temporary one."""
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        path.mkdir(parents=True, exist_ok=True)
        yield path


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
