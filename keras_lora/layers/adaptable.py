"""Whether a layer can be adapted, and the trainable flag that it had before."""

from __future__ import annotations

import keras

from keras_lora.checks import invalid
from keras_lora.layers.kinds import kinds_of

# The attribute of a layer or variable for its trainable flag from before it was adapted.
WAS_TRAINABLE = "_lora_was_trainable"


def check_adaptable(layer: keras.layers.Layer) -> None:
    """Refuse a layer whose kernel is not simply `W0`.

    Raises:
        ValueError: a kernel constraint, Keras's own LoRA, quantized weights.
    """
    name = layer.path or layer.name
    for kind in kinds_of(type(layer)).values():
        if kind.constraint is None:
            continue  # `check_bare` asks the variable
        constraint = getattr(layer, kind.constraint)
        if constraint is not None:
            raise ValueError(
                f"Layer '{name}': expected no {kind.constraint.replace('_', ' ')}, since a "
                "constraint on W0 does not hold for W0 + AB. Received: "
                f"{kind.constraint}={constraint}. Exclude the layer or build it without the "
                "constraint."
            )
    if getattr(layer, "lora_enabled", False) or getattr(layer, "lora_rank", None):
        raise ValueError(
            f"Layer '{name}': expected a layer without Keras's own LoRA. Received: "
            f"lora_rank={layer.lora_rank}. Do not call `enable_lora` on a model that keras_lora "
            "adapts."
        )
    if layer.dtype_policy.quantization_mode is not None:
        raise ValueError(
            f"Layer '{name}': expected floating-point weights. Received: "
            f"quantization_mode={layer.dtype_policy.quantization_mode!r}. Adapt and merge first, "
            "then quantize, or exclude the layer."
        )


def check_adapter_name(name: object) -> str:
    if not isinstance(name, str) or not name or "/" in name or "." in name:
        raise invalid(
            "name", "a non-empty adapter name without '/' or '.'", name, 'try name="default"'
        )
    return name


def remember_flag(item: keras.layers.Layer | keras.Variable) -> None:
    """Store the trainable flag that `freezing.thaw` restores; never overwrite a stored flag."""
    if not hasattr(item, WAS_TRAINABLE):
        setattr(item, WAS_TRAINABLE, item.trainable)
