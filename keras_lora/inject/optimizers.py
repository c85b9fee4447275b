"""Optimizers of models whose adapters change.

An optimizer has moments for each variable that trains, such as those of slots. When another adapter
moves into a slot, the moments there belong to the old one. So moments move with the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import keras

from keras_lora.layers.factors import read, write
from keras_lora.lowrank.equations import Tensor

State = list[Tensor]
# For each optimizer, the parked states, by the names of the adapters that were active.
_PARKED: WeakKeyDictionary[Any, dict[tuple[str, ...], State]] = WeakKeyDictionary()


def fresh_optimizer(model: keras.Model) -> Any | None:
    """A new optimizer of the same configuration, or None where the model has none built.

    Raises:
        ValueError: the optimizer cannot be made from its own config.
    """
    optimizer = built_optimizer(model)
    if optimizer is None:
        return None
    try:
        return type(optimizer).from_config(optimizer.get_config())
    except Exception as error:
        raise ValueError(
            "The variables that train are about to change, and the compiled optimizer must be "
            f"built anew. Expected one that from_config(get_config()) can make. Received: "
            f"{type(optimizer).__name__}, which cannot ({error}). Compile the model after this "
            "call instead: set model.optimizer = None first."
        ) from error


def built_optimizer(model: keras.Model) -> Any | None:
    optimizer = getattr(model, "optimizer", None)
    return optimizer if optimizer is not None and optimizer.built else None


def switch_optimizer(model: keras.Model, left: Sequence[str], entered: Sequence[str]) -> None:
    """Park the moments of the adapters that leave, and restore those of the adapters that enter.

    Adapters that never trained start with the moments of a fresh optimizer. The learning rate
    stays.
    """
    optimizer = built_optimizer(model)
    if optimizer is None or list(left) == list(entered):
        return
    parked = _PARKED.setdefault(optimizer, {})
    state = _state(optimizer)
    parked[tuple(left)] = [read(v) for v in state]
    values = parked.pop(tuple(entered), None)
    for variable, value in zip(state, values or _initial(model), strict=True):
        write(variable, value)


def reset_optimizer(model: keras.Model) -> None:
    """Let the optimizer start anew, with the same learning rate and nothing traced again."""
    optimizer = built_optimizer(model)
    if optimizer is not None:
        for variable, value in zip(_state(optimizer), _initial(model), strict=True):
            write(variable, value)


def forget_optimizer_states(model: keras.Model, name: str) -> None:
    """Drop the moments that are parked for an adapter that was deleted or replaced."""
    optimizer = built_optimizer(model)
    parked = {} if optimizer is None else _PARKED.get(optimizer, {})
    for names in [names for names in parked if name in names]:
        del parked[names]


def _state(optimizer: Any) -> list[keras.Variable]:
    learning_rate = optimizer.learning_rate  # a variable, or what a schedule computes
    return [v for v in optimizer.variables if v is not learning_rate]


def _initial(model: keras.Model) -> State:
    fresh: Any = fresh_optimizer(model)
    fresh.build(model.trainable_variables)
    return [read(v) for v in _state(fresh)]
