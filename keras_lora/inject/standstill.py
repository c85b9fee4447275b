"""Training is refused while the base's own values are in variables that train with adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

from keras_lora.inject.switching import known_models
from keras_lora.walker import Tree


@contextlib.contextmanager
def no_training(tree: Tree) -> Iterator[None]:
    """Within the context `fit` and `train_on_batch` of the models that were adapted raise.

    They would move the base's own heads and biases, and empty slots by the moments of adapters.
    Flags would not keep them from it: a compiled step trains what it was traced for.
    """
    before = [(model, model.train_function) for model in known_models(tree)]
    for model, _ in before:
        model.train_function = _refuse
    try:
        yield
    finally:
        for model, function in before:
            if model.train_function is _refuse:  # others may have dropped it for good
                model.train_function = function


def _refuse(*_: Any) -> NoReturn:
    raise ValueError(
        "Expected no training within `with disable_adapter(model)` or `use_adapter`: it would move "
        "the base's own heads and biases, or adapters by the moments of others. Received: a step "
        "of training. Leave the context first. To train what belongs to no adapter, without "
        "adapters: set_adapter(model, None)."
    )
