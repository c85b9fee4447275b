"""The conversion of a built layer in place, whichever class it is converted to.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_call_signature`, `_call_has_training_arg`, `_call_has_mask_arg`, `_call_context_args`,
        `_call_has_context_arg`: Keras looks at the signature of `call` in the constructor alone,
        and an adapted class may have another.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lora.config import AdapterSpec
from keras_lora.initializers import stand_in
from keras_lora.layers.bank import AdapterBank
from keras_lora.layers.kinds import kinds_of
from keras_lora.layers.quantized import stop_gradient
from keras_lora.layers.slots import Room
from keras_lora.layers.state import LoRAState


def convert(layer: Any, lora_class: type, state: LoRAState | None = None) -> Any:
    """Turn a built layer into one of an adapted class, with the adapters of `state` or none."""
    layer._lora = state or LoRAState.of(layer, type(layer), kinds_of(lora_class))
    # Keras's constructor bound the plain class's method, in the place of the adapted class's.
    layer._lora.quantize = vars(layer).pop("quantize", None)
    stop_gradient(layer)
    become(layer, lora_class)
    for bank in layer.banks.values():
        bank.track()
    return layer


def become(layer: keras.layers.Layer, layer_class: Any) -> None:
    """Change the class of a layer, and what Keras recorded of its `call` in the constructor.

    With the record of a `call` that has no `training`, an adapter would have no dropout.
    """
    layer.__class__ = layer_class
    signature = inspect.signature(layer.call)
    layer._call_signature = signature
    layer.call_signature_parameters = list(signature.parameters)
    layer._call_has_training_arg = "training" in signature.parameters
    layer._call_has_mask_arg = "mask" in signature.parameters
    layer._call_has_context_arg = {
        name: name in signature.parameters for name in layer._call_context_args
    }


def fill(
    bank: AdapterBank, specs: Mapping[str, AdapterSpec], active: Sequence[str], room: Room | None
) -> None:
    """Add adapters to the empty bank of a built layer; with `room` their values are in a file."""
    for name, spec in specs.items():
        start = bank.site.kind.start_of(spec.init)
        bank.add(name, spec, start=start if room is None else stand_in(start))
    if room is not None:
        bank.make_room(room)
    bank.activate(active, room is None or room.trainable)
