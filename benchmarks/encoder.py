"""The model that is timed: a BERT-shaped KerasHub encoder with a classifier, and one batch."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import numpy as np

CLASSES, HEAD = 2, "classifier"


def add_shape(parser: argparse.ArgumentParser, layers: int) -> None:
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the encoder itself")


def classifier(args: argparse.Namespace) -> keras.Model:
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=args.vocabulary,
        num_layers=args.layers,
        num_heads=max(1, args.width // 64),
        hidden_dim=args.width,
        intermediate_dim=4 * args.width,
        dropout=args.dropout,
        max_sequence_length=max(512, args.length),
    )
    logits = keras.layers.Dense(CLASSES, name=HEAD)(backbone.output["pooled_output"])
    return keras.Model(backbone.input, logits)


def compiled(model: keras.Model, jit: bool) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, jit_compile=jit)
    return model


def fixed_batch(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    shape = (args.batch, args.length)
    rng = np.random.default_rng(0)
    x = {
        "token_ids": rng.integers(0, args.vocabulary, shape, "int32"),
        "segment_ids": np.zeros(shape, "int32"),
        "padding_mask": np.ones(shape, "int32"),
    }
    return x, rng.integers(0, CLASSES, args.batch)


def train_only(model: keras.Model, chosen: Callable[[keras.Variable], bool]) -> None:
    for variable in model.variables:
        variable.trainable = chosen(variable)


def with_everything(model: keras.Model) -> None:
    """Full fine-tuning: all of a new model trains."""


def quantize(model: keras.Model, mode: str, **options: Any) -> None:
    """`model.quantize`, without Keras's warnings about layers that have nothing to quantize."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Layer .* does not have a `quantize` method")
        model.quantize(mode, **options)
