"""Which optimizers train an adapter in a slot of a higher rank as they would train it alone.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_get_call_context`: a layer does not know which model calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_lora.layers.slots import Slot

# The step of an element depends on the element's own gradients and moments, so that zeros beside it
# change nothing. Adafactor takes means of rows and columns, Lamb norms, Muon products of matrices.
# A subclass of a user may do anything.
_BY_ELEMENT = (
    keras.optimizers.Adadelta,
    keras.optimizers.Adagrad,
    keras.optimizers.Adam,
    keras.optimizers.AdamW,
    keras.optimizers.Adamax,
    keras.optimizers.Ftrl,
    keras.optimizers.Lion,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
    keras.optimizers.SGD,
    keras.optimizers.ScheduleFreeAdamW,
)


def parts_of(optimizer: Any) -> list[Any]:
    """An optimizer that wraps none, or those that it wraps."""
    inner = getattr(optimizer, "inner_optimizer", None)
    wrapped = getattr(optimizer, "optimizers", ()) if inner is None else [inner]
    return [part for each in wrapped for part in parts_of(each)] or [optimizer]


def goes_by_element(optimizer: Any) -> bool:
    """Whether padding has no effect on the training by this optimizer; True for None."""
    return optimizer is None or all(
        # On torch Keras makes subclasses of its own.
        isinstance(part, _BY_ELEMENT) and type(part).__module__.startswith("keras.")
        for part in parts_of(optimizer)
    )


def check_ranks(layer: keras.layers.Layer, slots: Sequence[Slot]) -> None:
    """Refuse to train a padded adapter by an optimizer that does not go by element.

    `fit` of the models that `set_adapter` knows never comes here: it makes slots of the adapter's
    own rank first.

    Raises:
        ValueError: the model that calls the layer has such an optimizer.
    """
    if not any(slot.is_padded for slot in slots):
        return
    optimizer = getattr(layer._get_call_context().entry_layer, "optimizer", None)
    if not goes_by_element(optimizer):
        raise ValueError(
            f"Expected the adapters of layer '{layer.path}' in slots of their own ranks, since "
            f"{type(optimizer).__name__} does not go by element. Received: an adapter in a slot of "
            "another one's higher rank. Call set_adapter(model, names) after compile, with the "
            "model that trains."
        )
