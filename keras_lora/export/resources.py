"""The tables of a model that a server must fill before it answers, such as vocabularies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lora.inject import unique
from keras_lora.layers import LoRALayer
from keras_lora.walker import Layer, all_layers

_Resource = tf.saved_model.experimental.TrackableResource


def used_resources(model: keras.Model, traces: Sequence[Any]) -> list[Any]:
    """The resources of the model's layers that these traces use.

    Of a task whose requests are tokens, the tables of the tokenizer stay out of the SavedModel.

    Args:
        model: The model.
        traces: Instances of `ConcreteFunction`.
    """
    used = {id(tensor) for each in traces for tensor in each.captured_inputs}
    used -= {id(variable.handle) for each in traces for variable in each.variables}
    if not used:
        return []
    found = unique(r for layer in all_layers(model) for r in _resources(layer))
    return [resource for resource in found if id(resource.resource_handle) in used]


def _resources(layer: Layer) -> Iterator[Any]:
    """The resources that a layer keeps as attributes, in lists and dicts too."""
    kept = (item for item in _leaves(vars(layer)) if isinstance(item, _Resource | tf.Module))
    return below((layer, *kept))


def below(roots: Iterable[Any]) -> Iterator[Any]:
    """The resources among these objects and what they hold."""
    for root in roots:
        yield from (item for item in _View(root).descendants() if isinstance(item, _Resource))


class _View(tf.train.TrackableView):
    """What TensorFlow finds below an object, without asking adapted layers.

    These refuse to be asked for a checkpoint, and `_resources` looks at their attributes.
    """

    @classmethod
    def children(cls, obj: Any, *args: Any, **options: Any) -> Mapping[str, Any]:
        return {} if isinstance(obj, LoRALayer) else super().children(obj, *args, **options)


def _leaves(value: Any) -> Iterator[Any]:
    # `keras.tree` sorts the keys of a dict, which Keras's own attributes do not allow.
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
