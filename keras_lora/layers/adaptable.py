"""Whether a layer can be adapted, and the trainable flag that it had before."""

from __future__ import annotations

from typing import Any

import keras

from keras_lora.checks import invalid
from keras_lora.layers.guarded import adapted_class
from keras_lora.layers.kinds import KINDS, kinds_of
from keras_lora.layers.quantized import MODES, is_calibrated, mode_of

# The attribute of a layer or variable for its trainable flag from before it was adapted.
WAS_TRAINABLE = "_lora_was_trainable"


def check_adaptable(layer: keras.layers.Layer) -> None:
    """Refuse a layer whose kernel is not simply `W0`.

    Raises:
        ValueError: a kernel constraint, Keras's own LoRA, or weights that are
            quantized in a way that is not known.
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
    _check_quantized(layer, name)


def _check_quantized(layer: keras.layers.Layer, name: str) -> None:
    """Refuse a mode, or a class, of which the weight in floating point is not known."""
    mode = mode_of(layer)
    if mode is None:
        return
    received = f"Layer '{name}': expected {{}}. Received: quantization_mode={mode!r}"
    if mode not in MODES:
        raise ValueError(
            f"{received.format(f'floating-point weights, or one of {MODES}')}. Load the model in "
            "floating point, adapt and merge it, and quantize it then; or exclude the layer."
        )
    if not all(kind.quantizes for kind in kinds_of(type(layer)).values()):
        raise ValueError(
            f"{received.format('floating-point weights of a layer of this kind')}. Exclude it."
        )
    own: Any = next(
        c for c in type(layer).__mro__ if c in KINDS and c.__module__.startswith("keras.")
    )
    computed: Any = adapted_class(type(layer))
    if computed.call is not own.call:
        expected = f"a class that computes as {own.__name__} does, as Keras's quantized one does"
        raise ValueError(f"{received.format(expected)} of {type(layer).__name__}. Exclude it.")
    if layer.built and not is_calibrated(layer):
        raise ValueError(
            f"{received.format('calibrated weights')}, without values. Calibrate it with "
            "model.quantize, or exclude the layer."
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
