"""A MiniLM encoder, classifiers around it, and rows that it has tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import assets
import keras
import keras_hub
import numpy as np

import keras_lora as kl

# Sentence embeddings are means over tokens, so this encoder's pooler was never trained for a
# task: it trains in full, as the classifier does.
HEAD = ("pooled_dense", "logits")
CONFIG = kl.LoRAConfig(rank=8, alpha=16, layers_to_save=HEAD)

Features = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Data:
    """Tokenised rows."""

    features: Features
    labels: np.ndarray

    def accuracy(self, logits: np.ndarray) -> float:
        return float(np.mean(np.argmax(logits, axis=-1) == self.labels))


def encoder() -> keras.Model:
    """The pretrained encoder."""
    return keras_hub.models.BertBackbone.from_preset(str(assets.minilm()))


def classifier(classes: int, backbone: keras.Model | None = None) -> keras.Model:
    """A classifier of tokenised rows: the backbone, by default a new encoder, with a new head."""
    backbone = encoder() if backbone is None else backbone
    return keras_hub.models.BertTextClassifier(backbone, classes, preprocessor=None)


def preprocessor(length: int) -> keras.layers.Layer:
    """The layer that makes rows of `length` tokens from strings."""
    return keras_hub.models.BertTextClassifierPreprocessor.from_preset(
        str(assets.minilm()), sequence_length=length
    )


def tokenise(rows: assets.Rows, length: int) -> Data:
    features = preprocessor(length)(list(rows.texts))
    return Data(
        {name: np.asarray(x, "int32") for name, x in features.items()}, np.array(rows.labels)
    )
