"""Inputs of tiny backbones: tokens, masks, images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from support.keras_hub_backbones import sizes

Array = np.ndarray[Any, np.dtype[Any]]
Inputs = Array | dict[str, Array]
Factory = Callable[[], tuple[keras.Model, Inputs]]

BATCH = 2


def floats(*shape: int) -> Array:
    return np.random.default_rng(0).uniform(size=(BATCH, *shape)).astype("float32")


def mask(length: int = sizes.LENGTH, dtype: str = "int32") -> Array:
    """Ones, except two padded positions at the end of the second row."""
    mask = np.ones((BATCH, length), dtype=dtype)
    mask[1, -2:] = 0
    return mask


def ids(length: int = sizes.LENGTH, seed: int = 0) -> Array:
    """Token ids from 1 to sizes.VOCAB - 1, and 0 at the padded positions of `mask`."""
    ids = np.random.default_rng(seed).integers(1, sizes.VOCAB, size=(BATCH, length))
    return (ids * mask(length)).astype("int32")


def tokens(length: int = sizes.LENGTH) -> dict[str, Array]:
    return {"token_ids": ids(length), "padding_mask": mask(length)}


def segments(length: int = sizes.LENGTH) -> Array:
    segments = np.zeros((BATCH, length), dtype="int32")
    segments[:, length // 2 :] = 1
    return segments


def segmented() -> dict[str, Array]:
    return {**tokens(), "segment_ids": segments()}


def encoder_decoder(mask_dtype: str = "int32") -> dict[str, Array]:
    return {
        "encoder_token_ids": ids(sizes.LENGTH),
        "encoder_padding_mask": mask(sizes.LENGTH, mask_dtype),
        "decoder_token_ids": ids(sizes.LENGTH - 2, seed=1),
        "decoder_padding_mask": mask(sizes.LENGTH - 2, mask_dtype),
    }


def images(size: int) -> Array:
    return floats(size, size, 3)


def rows(values: list[int], dtype: str = "int32") -> Array:
    """The same row for each element of the batch."""
    return np.tile(np.array(values, dtype=dtype), (BATCH, 1))
