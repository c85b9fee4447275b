"""Whether a computation is being recorded, so that no value can move.

In a `tf.function`, or under `jax.jit` and `jax.grad`, a variable has no value to park.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import keras
from keras import ops

from keras_lora.walker import Tree

_WITHOUT_VALUES = ContextVar("without_values", default=False)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Within it verbs may change a model whose variables have shapes and dtypes, and no values."""
    token = _WITHOUT_VALUES.set(True)
    try:
        yield
    finally:
        _WITHOUT_VALUES.reset(token)


def are_without_values() -> bool:
    """Whether this code runs in `without_values`."""
    return _WITHOUT_VALUES.get()


def in_trace(tree: Tree) -> bool:
    """Whether this code runs in a function that is being traced or differentiated."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return not hasattr(ops.zeros(()), "numpy")
    if backend != "jax":
        return False
    # In `fit` with run_eagerly=True nothing is traced, yet the variables stand for tracers.
    values = [_value(slot.b) for bank in tree.banks[:1] for slot in bank.slots[:1]]
    tracer = importlib.import_module("jax").core.Tracer
    return any(isinstance(value, tracer) for value in [ops.zeros(()), *values])


def _value(variable: keras.Variable) -> Any:
    """
    Raises:
        ValueError: the variable has no value.
    """
    try:
        return variable.value
    except TypeError as error:
        raise ValueError(
            f"Expected variables with values. Received: '{variable.path}' without one, as on JAX "
            "in the middle of an epoch, or after an epoch that failed. In a callback use "
            "self.model, which puts the values back."
        ) from error


def check_not_traced(tree: Tree, verb: str) -> None:
    """
    Raises:
        ValueError: a computation is being recorded.
    """
    if not are_without_values() and in_trace(tree):
        raise ValueError(
            f"{verb}: expected a call outside compiled functions, since it moves values and "
            f"changes {tree.root.name!r}. Received: a call in a function that is being traced "
            "(tf.function, jax.jit, a train_step). Call it before or after; inside, "
            "disable_adapter, scale_adapter and use_adapter choose what is computed."
        )
