"""An adapter with a counterpart, read from files, as the ordinary LoRA that it computes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from keras_lora.config import AdapterSpec
from keras_lora.files.keys import factor_keys
from keras_lora.layers import layer_adapter


def as_ordinary(
    path: str, spec: AdapterSpec, tensors: Mapping[str, np.ndarray], rank_axis: int
) -> tuple[AdapterSpec, dict[str, np.ndarray]]:
    """The spec of a layer, and the tensors by key; of a counterpart nothing is left.

    Where the layer has none, or its tensors do not fit together, they stay as they are.

    Args:
        path: The layer's path in the files.
        spec: The layer's spec in the files.
        tensors: The tensors in the files, also of other layers.
        rank_axis: Where the rank is among the axes of `B`.
    """
    keys = factor_keys(path, spec)
    factors = [tensors[key] for key in keys if key in tensors]
    shapes = [factor.shape for factor in factors]
    if not spec.has_counterpart or len(keys) > len(factors) or shapes[:2] != shapes[-2:]:
        return spec, dict(tensors)
    part = layer_adapter(spec, factors).ordinary(rank_axis)
    others = {key: value for key, value in tensors.items() if key not in keys}
    found = zip(factor_keys(path, part.spec), map(np.array, part.factors), strict=True)
    return part.spec, others | dict(found)
