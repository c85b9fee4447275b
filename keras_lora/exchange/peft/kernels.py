"""The kernels of a Keras model whose factors are exchanged, and their Hugging Face modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import keras

from keras_lora.exchange.converters import Block, HuggingFaceWeights
from keras_lora.exchange.converters.tensors import Array
from keras_lora.exchange.peft.embeddings import refused_embeddings
from keras_lora.layers import family_of, output_norms, site_of
from keras_lora.lowrank.equations import EinsumSplit, Shape
from keras_lora.walker import walk


@dataclass(frozen=True, eq=False)
class ExchangedKernel:
    """A kernel of the Keras model whose factors are exchanged.

    Attributes:
        split: The axes of the kernel.
        shape: The shape of the kernel.
        is_embedding: Whether the kernel is an embedding matrix.
        refusal: Why the factors cannot be exchanged, or None.
        norms: Gives `|W0|` of each output.
    """

    split: EinsumSplit
    shape: Shape
    is_embedding: bool
    refusal: str | None
    norms: Callable[[], Array]


def exchanged_kernels(
    model: keras.Model, weights: HuggingFaceWeights
) -> dict[str, ExchangedKernel]:
    """The kernels of a model that are inside Hugging Face matrices, by the layer's path."""
    layers = {node.path: node.layer for node in walk(model) if node.path in weights.blocks}
    refusals = refused_embeddings(model, weights)
    return {
        path: ExchangedKernel(
            site_of(layer).split(),
            site_of(layer).shape,
            family_of(layer) == "embedding",
            refusals.get(path),
            partial(output_norms, site_of(layer)),
        )
        for path, layer in layers.items()
    }


def module_name(weight: str) -> str:
    return weight.removesuffix(".weight")


def module_names(weights: HuggingFaceWeights) -> list[str]:
    """The names of the Hugging Face modules whose matrices are kernels of the Keras model."""
    return sorted({module_name(b.weight) for found in weights.blocks.values() for b in found})


def blocks_by_module(weights: HuggingFaceWeights) -> dict[str, dict[str, Block]]:
    """For each Hugging Face module, the kernels that are blocks of its matrix, by path."""
    found: dict[str, dict[str, Block]] = {}
    for path, blocks in weights.blocks.items():
        # Without this ending the key names a bare parameter, which PEFT does not adapt.
        if len(blocks) == 1 and blocks[0].weight.endswith(".weight"):
            found.setdefault(module_name(blocks[0].weight), {})[path] = blocks[0]
    return found
