"""The `tf.distribute` strategy that a model's variables belong to.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_distribute_strategy`: in a scope, `distribute_strategy` of a model that was made in none names
        the scope's strategy.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import keras

from keras_lora.walker import Tree


def strategy_scope(tree: Tree) -> contextlib.AbstractContextManager[Any]:
    """The `tf.distribute` scope that a model was made in, in which to make new variables of it.

    Raises:
        ValueError: this code runs in the scope of another strategy.
    """
    if keras.backend.backend() != "tensorflow" or not tree.models:
        return contextlib.nullcontext()
    distribute = importlib.import_module("tensorflow").distribute
    current = distribute.get_strategy() if distribute.has_strategy() else None
    made_in = (model._distribute_strategy for model in tree.models)
    own: Any = next((strategy for strategy in made_in if strategy is not None), None)
    if own is current:
        return contextlib.nullcontext()
    if current is None:
        return own.scope()
    made = "no scope" if own is None else f"the scope of a {type(own).__name__}"
    raise ValueError(
        "Expected a call in the scope that the model was made in, or outside of any. Received: a "
        f"call in the scope of a {type(current).__name__}, for '{tree.root.name}', which was made "
        f"in {made}. Make the model in the scope that it is to train in."
    )
