"""The blocks of Hugging Face weights that kernels are, as arrays."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_lora.exchange.converters import Block, HuggingFaceWeights
from keras_lora.layers import site_of


def matrices(layer: keras.layers.Layer) -> np.ndarray[Any, Any]:
    """A kernel as `(shared, in, out)`."""
    split, kernel = site_of(layer).split(), np.array(site_of(layer).matrix)
    order = [split.kernel.index(c) for c in split.shared + split.contracted + split.free]
    return kernel.transpose(order).reshape(-1, *split.matrix_shape(kernel.shape))


def assert_same(a: HuggingFaceWeights, b: HuggingFaceWeights) -> None:
    def plain(block: Block) -> tuple[Any, ...]:
        where = block.rows.tolist(), block.columns.tolist()
        return block.weight, block.shape, block.stored_transposed, where

    # Not the paths: Keras numbers some layers over all models.
    for ours, theirs in zip(a.blocks.values(), b.blocks.values(), strict=True):
        assert [*map(plain, ours)] == [*map(plain, theirs)]
    assert list(a.refused.values()) == list(b.refused.values())
