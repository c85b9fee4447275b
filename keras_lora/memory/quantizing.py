"""Quantizing a model without values: the variables that `model.quantize` makes, and no integers.

Keras's own `quantize` computes them with NumPy.

Private Keras API in this file, and why (`tests/test_memory_plan.py` compares with `quantize`):
    `_embeddings`: by this name an embedding keeps its matrix.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import keras

from keras_lora.layers import drop_variable, unlocked
from keras_lora.walker import Tree

_MATRICES: dict[type, tuple[str, ...]] = {
    keras.layers.Dense: ("_kernel",),
    keras.layers.EinsumDense: ("_kernel",),
    keras.layers.Embedding: ("_embeddings",),
    keras.layers.ReversibleEmbedding: ("_embeddings", "reverse_embeddings"),
}
_CONFIGS = {
    "int8": keras.quantizers.Int8QuantizationConfig,
    "int4": keras.quantizers.Int4QuantizationConfig,
}


def quantize_without_values(model: keras.Model, quantized: Any, kept: Collection[int]) -> None:
    """Give the layers of a model that is in floating point the variables of a quantized one.

    Args:
        model: A model without values.
        quantized: `"int8"`, `"int4"`, or a config of Keras for one of them.
        kept: The ids of variables that train in full, whose layers stay in floating point.
    """
    config = _CONFIGS[quantized]() if isinstance(quantized, str) else quantized
    for layer in Tree.of(model).layers:
        if type(layer) in _MATRICES and layer.quantization_mode is None:
            if any(id(v) in kept for v in layer.weights[:1]):
                continue
            _quantize(layer, config)


def _quantize(layer: Any, config: Any) -> None:
    names = [n for n in _MATRICES[type(layer)] if isinstance(vars(layer).get(n), keras.Variable)]
    embeds = "_embeddings" in names
    shape = (layer.input_dim, layer.output_dim) if embeds else tuple(getattr(layer, names[0]).shape)
    layer.quantization_config = config
    with unlocked(layer):
        for name in names:
            drop_variable(layer, name)
        layer.quantized_build(shape, config.mode, config)
    size = getattr(config, "block_size", None)
    mode = f"int4/{-1 if size is None else size}" if config.mode == "int4" else config.mode
    layer.dtype_policy = f"{mode}_from_{layer.dtype_policy.name}"
