"""What the examples share: batches of rows, a progress bar in `fit`, options and folders."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

BATCH = 32
# The first steps compile.
WARM_UP = 5

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

Features = np.ndarray | Mapping[str, np.ndarray]


def compile_for_training(
    model: keras.Model, loss: object = CROSS_ENTROPY, jit: bool = True, optimizer: Any = None
) -> None:
    optimizer = keras.optimizers.Adam() if optimizer is None else optimizer
    # By default Keras leaves XLA off on a CPU, where XLA about halves the time of a transformer's
    # steps.
    model.compile(optimizer=optimizer, loss=loss, jit_compile=jit)


def batches(
    features: Features, labels: np.ndarray, steps: int, seed: int, size: int = BATCH
) -> tf.data.Dataset:
    """`steps` batches of rows in a random order; each row comes once before any comes twice."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * size // len(labels))
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])[: steps * size]
    rows = keras.tree.map_structure(lambda x: x[order], (features, labels))
    return tf.data.Dataset.from_tensor_slices(rows).batch(size)


class Steps(keras.callbacks.Callback):
    """Lowers the learning rate linearly to 0, times each step and moves a progress bar."""

    def __init__(self, rate: float, total: int, progress: Progress, title: str) -> None:
        super().__init__()
        self._rate, self._total, self._progress = rate, total, progress
        self._bar = progress.add_task(title, total=total, loss="compiling")
        self._started = 0.0
        self.seconds: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        # Of all epochs, whose batches are counted anew.
        self.model.optimizer.learning_rate = self._rate * (1 - len(self.seconds) / self._total)
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


def argument_parser(
    documentation: str | None, steps: int, batch: int = BATCH
) -> argparse.ArgumentParser:
    """A parser with the options that every example has."""
    parser = argparse.ArgumentParser(description=(documentation or "").splitlines()[0])
    parser.add_argument("--steps", type=positive, default=steps, help=f"of {batch} rows; {steps}")
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
