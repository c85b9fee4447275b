"""Layers that Keras has quantized, for each of its grids of integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.quantizers import (
    AWQConfig,
    GPTQConfig,
    Int4QuantizationConfig,
    Int8QuantizationConfig,
)

from support.cases import named

Quantize = Callable[[keras.layers.Layer], Any]


def by(config: Any) -> Quantize:
    return lambda layer: layer.quantize(config=config, type_check=False)


def calibrated(mode: str, config: Any) -> Quantize:
    """Integers that are drawn, in the place of those that a calibration finds."""

    def quantize(layer: Any) -> None:
        layer.quantize(mode, config=config)
        rng = np.random.default_rng(5)
        for name in ("quantized_kernel", "kernel_zero"):
            variable = getattr(layer, name)
            top = 256 if name == "quantized_kernel" and config.weight_bits == 4 else 4
            variable.assign(rng.integers(0, top, variable.shape))
        layer.kernel_scale.assign(rng.uniform(0.1, 0.3, layer.kernel_scale.shape))
        inputs = layer.g_idx.shape[0]
        layer.g_idx.assign(np.arange(inputs) * layer.kernel_scale.shape[1] // inputs)
        if mode == "awq":
            layer.awq_scales.assign(rng.uniform(0.5, 2, inputs))
        setattr(layer, f"is_{mode}_calibrated", True)
        del layer._kernel

    return quantize


_DATA = {"dataset": None, "tokenizer": None, "group_size": 3}
_GPTQ = GPTQConfig(weight_bits=4, **_DATA)
# Of these the product does not round its inputs, so that it is the one in floating point.
EXACT: dict[str, Quantize] = {
    "int8 of weights": by(Int8QuantizationConfig(activation_quantizer=None)),
    "int4": by(Int4QuantizationConfig()),
    "int4, a scale for each output": by(Int4QuantizationConfig(block_size=None)),
    "int4, groups of 3": by(Int4QuantizationConfig(block_size=3)),
}
CALIBRATED: dict[str, Quantize] = {
    "gptq": calibrated("gptq", _GPTQ),
    "gptq, 2 bits": calibrated("gptq", GPTQConfig(weight_bits=2, **_DATA)),
    "awq": calibrated("awq", AWQConfig(**_DATA)),
}
INT8 = {"int8": by(Int8QuantizationConfig())}
GRIDS = INT8 | EXACT | CALIBRATED
LINEAR = named(
    "dense, activation",
    "btd,dnh->btnh",
    "btnh,nhd->btd",
    "btd,nhd->btnh",
    "bed,edf->bef",
)
TABLES = named(
    "embedding", "reversible, tied", "reversible, untied", "reverse", "reverse, soft cap"
)
PAIRS = [(case, grid) for case in [*LINEAR, *TABLES] for grid in INT8 | EXACT]
PAIRS += [(case, grid) for case in LINEAR[:3] for grid in CALIBRATED]
PAIR_IDS = [f"{case.id}, {grid}" for case, grid in PAIRS]


def quantized(case: Any, grid: str, **options: Any) -> keras.Model:
    model = case.model(**options)
    GRIDS[grid](model.get_layer("case"))
    return model
