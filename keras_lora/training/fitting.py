"""What `fit` settles by itself: where it starts, and in which direction a metric improves.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_initial_epoch`: where `fit` starts. A callback comes too late for the argument
        `initial_epoch`, and `keras.callbacks.BackupAndRestore` does the same.
    `_symbolic_build`: on TensorFlow metrics have no variables before the first step, but those
        of an interrupted epoch must be restored before it.
    `_direction`: whether a metric improves upwards, as `keras.callbacks.ModelCheckpoint` asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_lora.checks import invalid
from keras_lora.inject import active_names, check_names
from keras_lora.walker import Tree

MODES = ("auto", "min", "max")


def start_fit_at(model: keras.Model, epoch: int | None) -> None:
    """Let `fit` start at this epoch; with None, at its argument `initial_epoch`."""
    model._initial_epoch = epoch


def improves_upwards(model: keras.Model, metric: str) -> bool | None:
    """Whether more is better for a metric of a model; None if Keras does not know."""
    if metric == "loss":
        return False
    nested = [m for outer in model.metrics for m in getattr(outer, "metrics", [outer])]
    directions = [getattr(m, "_direction", None) for m in nested if m.name == metric]
    return None if None in directions or not directions else directions[0] == "up"


def check_trains(model: keras.Model, name: str) -> None:
    """
    Raises:
        ValueError: no adapter of that name, or one that does not train.
    """
    tree = Tree.of(model)
    check_names(tree, [name])
    if not any(bank.trains for bank in tree.banks if name in bank.active):
        raise ValueError(
            f"Expected an adapter that trains. Received: name={name!r}, while "
            f"{active_names(tree)} are active. Call set_adapter(model, {name!r}) first."
        )


def is_better(value: float, best: float | None, upwards: Callable[[], bool]) -> bool:
    """Whether a value is better than the best before, if there was one; NaN never is.

    `upwards` says whether more is better. It is asked only where there is something to compare.
    """
    if math.isnan(value):
        return False
    return best is None or (value > best if upwards() else value < best)


def direction_of(model: keras.Model, monitor: str, mode: str) -> bool:
    """Whether more is better for a name in the logs of a model.

    Raises:
        ValueError: `"auto"` for a metric whose direction Keras does not know.
    """
    if mode != "auto":
        return mode == "max"
    upwards = improves_upwards(model, monitor.removeprefix("val_"))
    if upwards is None:
        raise invalid("mode", f"'min' or 'max' for monitor={monitor!r}", mode)
    return upwards


class SkippedBatches:
    """Stands in for a model's train function: batches are read, and nothing is computed.

    Args:
        model: The model, within `fit`.
        count: The number of batches to pass over.
        resume_metrics: Called once the metrics have variables, before the first logs are taken.
    """

    def __init__(self, model: keras.Model, count: int, resume_metrics: Callable[[], None]) -> None:
        self._model = model
        self._left = count
        self._resume_metrics = resume_metrics
        self._train = model.train_function
        self._logs: dict[str, Any] = {}

    def start(self) -> None:
        """Take the place of the train function; the inverse of `stop`."""
        # On TensorFlow the metrics have no variables yet. On JAX the variables have no
        # values during a step, so the logs are taken before it.
        if keras.backend.backend() != "tensorflow":
            self._resume()
        self._model.train_function = self

    def stop(self) -> None:
        """Give the place back to the train function."""
        self._model.train_function = self._train

    def __call__(self, *arguments: Any) -> Any:
        """Called by Keras in the place of a training step."""
        try:
            if keras.backend.backend() != "torch":  # on torch `fit` itself reads the data
                self._read(arguments[-1])
        except BaseException:
            self.stop()
            raise
        self._left -= self._model.steps_per_execution
        if self._left <= 0:
            self.stop()
        # On JAX Keras passes the model's state too, and expects the logs and the state back.
        return (dict(self._logs), arguments[0]) if len(arguments) > 1 else dict(self._logs)

    def _read(self, iterator: Iterator[Any]) -> None:
        batch = _next_batch(iterator, self._model.steps_per_execution)
        if not self._logs:
            self._model._symbolic_build(data_batch=batch)
            self._resume()

    def _resume(self) -> None:
        self._resume_metrics()
        self._logs.update(self._model.get_metrics_result())


def stop_skipping(model: keras.Model) -> None:
    """Give the train function its place back, where `SkippedBatches` stand in for it."""
    if isinstance(model.train_function, SkippedBatches):
        model.train_function.stop()


def _next_batch(iterator: Iterator[Any], count: int) -> Any:
    """Read as many batches as an execution of the train function does, and return the first."""
    first = next(iterator)
    for _ in range(count - 1):
        next(iterator, None)  # the last execution of an epoch may have fewer
    return first
