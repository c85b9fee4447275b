"""What `fit` settles by itself: where it starts, and in which direction a metric improves.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_initial_epoch`: where `fit` starts. A callback comes too late for the argument
        `initial_epoch`, and `keras.callbacks.BackupAndRestore` does the same.
    `_symbolic_build`: on TensorFlow metrics have no variables before the first step, and those
        of a broken epoch go on from where they were.
    `_direction`: whether a metric improves upwards, as `keras.callbacks.ModelCheckpoint` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras


def start_fit_at(model: keras.Model, epoch: int | None) -> None:
    """Let `fit` start at this epoch, or again where its argument says."""
    model._initial_epoch = epoch


def improves_upwards(model: keras.Model, metric: str) -> bool | None:
    """Whether more is better for a metric of a model; None where nobody says."""
    if metric == "loss":
        return False
    nested = [m for outer in model.metrics for m in getattr(outer, "metrics", [outer])]
    directions = [getattr(m, "_direction", None) for m in nested if m.name == metric]
    return None if None in directions or not directions else directions[0] == "up"


def skip_batches(model: keras.Model, count: int, resume_metrics: Callable[[], None]) -> None:
    """Let `fit` pass over the next batches: they are read, and nothing is computed.

    `resume_metrics` is called once the metrics have variables, before the first logs are taken.
    The inverse is `stop_skipping`.
    """
    train, left, logs = model.train_function, count, dict[str, Any]()
    reads = keras.backend.backend() != "torch"  # there `fit` itself reads the data

    def resume() -> None:
        resume_metrics()
        logs.update(model.get_metrics_result())

    def read(iterator: Iterator[Any]) -> None:
        batch = _next_batch(iterator, model.steps_per_execution)
        if not logs:
            model._symbolic_build(data_batch=batch)
            resume()

    def skip(*arguments: Any) -> Any:
        nonlocal left
        try:
            if reads:
                read(arguments[-1])
        except BaseException:
            model.train_function = train
            raise
        left -= model.steps_per_execution
        if left <= 0:
            model.train_function = train
        # On JAX the function has the model's state beside the data, and gives both back.
        return (dict(logs), arguments[0]) if len(arguments) > 1 else dict(logs)

    if keras.backend.backend() != "tensorflow":  # on JAX the model is without values in a step
        resume()
    skip.instead_of = train  # type: ignore[attr-defined]
    model.train_function = skip


def stop_skipping(model: keras.Model) -> None:
    if hasattr(model.train_function, "instead_of"):
        model.train_function = model.train_function.instead_of


def _next_batch(iterator: Iterator[Any], count: int) -> Any:
    """Read as many batches as an execution of the train function does, and return the first."""
    first = next(iterator)
    for _ in range(count - 1):
        next(iterator, None)  # the last execution of an epoch may have fewer
    return first
