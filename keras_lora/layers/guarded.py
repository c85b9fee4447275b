"""What Keras may ask of an adapted layer that would undo its adapters: refused, or bounded.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_trackable_children`: all that `tf.train.Checkpoint` and `tf.saved_model.save` ask of a layer.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_lora.layers.state import LoRAState


class Adapting:
    """Marks this package's classes, which come before Keras's among the bases of a layer class."""


def adapted_class(lora_class: type) -> type:
    """The class that a class of this package adapts."""
    return next(c for c in lora_class.__mro__ if not issubclass(c, Adapting))


class Guarded(Adapting):
    """Abstract: a layer whose `W0` neither trains nor takes another form while it has adapters."""

    @property
    def trainable(self) -> bool:
        """Whether the adapters may train, and the bias if it trains with them. `W0` never does.

        So `model.trainable = False`, and then True again, leaves the layer as it was.
        """
        return bool(keras.layers.Layer.trainable.fget(self))

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)
        state: LoRAState | None = vars(self).get("_lora")  # None in the constructor
        if state is not None and value:
            for variable in state.frozen:
                variable.trainable = False

    def enable_lora(self, *_: Any, **__: Any) -> None:
        """Refuse: merging and saving would not see Keras's own adapters."""
        raise ValueError(
            f"{_described(self)}: expected no adapters of keras_lora where Keras's own LoRA is "
            "enabled. Add another adapter with apply_lora(model, config, name=...)."
        )

    def set_weights(self, weights: Any) -> None:
        """As in Keras, with a refusal that names `assign_base`."""
        layer: Any = self
        expected, received = len(layer.weights), len(weights)
        if expected != received:
            raise ValueError(
                f"{_described(self)}: expected {expected} arrays, those of the adapters in it "
                f"too. Received: {received}. To give the base other values write "
                "layer.assign_base(kernel) and layer.bias.assign(bias)."
            )
        keras.layers.Layer.set_weights(layer, weights)

    def quantize(self, *_: Any, **__: Any) -> None:
        """Refuse: of one layer alone, the compiled functions of the model would be stale."""
        raise ValueError(
            f"{_described(self)}: expected model.quantize, which keeps them. Received: "
            "layer.quantize. Call model.quantize(mode, filters=...), in which filters choose "
            "layers; or merge first: merge_lora(model)."
        )

    def _trackable_children(self, save_type: str = "checkpoint", **options: Any) -> Any:
        """Refuse a `tf.train.Checkpoint`, which would have neither `A` nor `B`.

        A SavedModel gets the variables of slots, which are no attributes of the layer.
        """
        if save_type == "checkpoint":
            raise ValueError(
                f"{_described(self)}, and a tf.train.Checkpoint would contain none of them. Use "
                "model.save_weights and load_weights, or keras_lora.AdapterCheckpoint."
            )
        base: Any = super()
        children = base._trackable_children(save_type, **options)
        added: Any = self
        variables = {f"adapter_{i}": v.value for i, v in enumerate(added.adapter_variables)}
        return {**children, **variables}


def _described(layer: Any) -> str:
    names = {name: None for bank in layer.banks.values() for name in bank.adapters}
    return f"Layer '{layer.path}' has the adapters {list(names)}"
