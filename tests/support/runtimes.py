"""Small models of many kinds, and the runtimes of ONNX and LiteRT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers

import keras_lora as kl
from support.exports import classifier, sequential, two_inputs
from support.models import composite, functional, subclassed

Feeds = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[Any, ...]]

# --- Models ---------------------------------------------------------------------------------------

HUB: dict[str, Any] = {"vocabulary_size": 31, "num_layers": 2}
ENCODER = HUB | {"num_heads": 3, "hidden_dim": 15, "intermediate_dim": 17}
DECODER = HUB | {"num_query_heads": 4, "hidden_dim": 24, "intermediate_dim": 34}


def roberta() -> keras.Model:
    backbone = keras_hub.models.RobertaBackbone(**ENCODER, max_sequence_length=13)
    return keras_hub.models.RobertaTextClassifier(backbone, num_classes=5, preprocessor=None)


def gpt2() -> keras.Model:
    backbone = keras_hub.models.GPT2Backbone(**ENCODER, max_sequence_length=13)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def llama() -> keras.Model:
    backbone = keras_hub.models.LlamaBackbone(**DECODER, num_key_value_heads=2)
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


def gemma() -> keras.Model:
    backbone = keras_hub.models.GemmaBackbone(**DECODER, num_key_value_heads=1, head_dim=6)
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)


def vit() -> keras.Model:
    sizes = {"num_layers": 2, "num_heads": 3, "hidden_dim": 15, "mlp_dim": 17}
    backbone = keras_hub.models.ViTBackbone(image_shape=(12, 12, 3), patch_size=4, **sizes)
    return keras_hub.models.ViTImageClassifier(backbone, num_classes=5, preprocessor=None)


def convolutional() -> keras.Model:
    """The parts of a MobileNet: convolutions, separable ones, normalization, a residual."""
    inputs = keras.Input((None, None, 3), name="image")
    x = y = layers.Conv2D(7, 3, strides=2, padding="same", activation="relu6")(inputs)
    x = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x))
    x = layers.GlobalAveragePooling2D()(layers.Add()([y, layers.Conv2D(7, 1)(x)]))
    return keras.Model(inputs, layers.Dense(5, name="head")(layers.Dense(11, name="up")(x)))


def cross_attention() -> keras.Model:
    query, value = keras.Input((None, 5), name="query"), keras.Input((None, 7), name="value")
    x = layers.MultiHeadAttention(3, 2, name="attention")(query, value)
    return keras.Model([query, value], layers.Dense(3, name="head")(x))


def named_by_keys() -> keras.Model:
    left, right = keras.Input((5,), name="left"), keras.Input((7,), name="right")
    x = layers.Dense(11, activation="silu", name="up")(layers.Concatenate()([left, right]))
    outputs = {"class": layers.Dense(3)(x), "box": layers.Dense(2)(x)}
    return keras.Model({"left": left, "right": right}, outputs)


def gelu(approximate: bool) -> keras.Model:
    def activation(x: Any) -> Any:
        return keras.ops.gelu(x, approximate=approximate)

    hidden = layers.Dense(7, activation=activation, name="up")
    return keras.Sequential([keras.Input((5,), name="x"), hidden, layers.Dense(3, name="head")])


def recurrent(**options: Any) -> keras.Model:
    inputs = keras.Input((None, 5), name="series")
    x = layers.Dense(7, name="up")(inputs)
    x = layers.Bidirectional(layers.LSTM(3, **options))(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


class Unused(keras.Model):
    """One of its inputs has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = layers.Dense(7, name="up"), layers.Dense(3, name="head")

    def call(self, inputs: Any) -> Any:
        return self.head(self.up(inputs["used"]))


def unused() -> keras.Model:
    model = Unused()
    model({"spare": np.zeros((1, 3), "float32"), "used": np.zeros((1, 5), "float32")})
    return model


TOKENS = {"padding_mask": (None,), "token_ids": (None,)}

# A model, the shapes of its inputs without the batch, and the names of its outputs.
MODELS: dict[str, tuple[Callable[[], keras.Model], Shapes, list[str]]] = {
    "functional": (functional, {"features": (5,)}, ["head"]),
    "sequential": (sequential, {"x": (5,)}, ["head"]),
    "subclassed": (subclassed, {"input_0": (5,)}, ["output_0"]),
    "lists": (two_inputs, {"left": (5,), "right": (7,)}, ["class", "box"]),
    "dicts": (named_by_keys, {"left": (5,), "right": (7,)}, ["box", "class"]),
    "exact GELU": (lambda: gelu(False), {"x": (5,)}, ["head"]),
    "tanh GELU": (lambda: gelu(True), {"x": (5,)}, ["head"]),
    "blocks": (composite, {"sequence": (None, 5)}, ["head"]),
    "MultiHeadAttention": (cross_attention, {"query": (None, 5), "value": (None, 7)}, ["head"]),
    "convolutions": (convolutional, {"image": (None, None, 3)}, ["head"]),
    "LSTM": (recurrent, {"series": (None, 5)}, ["head"]),
    "BERT": (classifier, TOKENS | {"segment_ids": (None,)}, ["logits"]),
    "RoBERTa": (roberta, TOKENS, ["logits"]),
    "GPT-2": (gpt2, TOKENS, ["token_embedding"]),
    "Llama": (llama, TOKENS, ["token_embedding"]),
    "Gemma": (gemma, TOKENS, ["token_embedding"]),
    "ViT": (vit, {"images": (12, 12, 3)}, ["predictions"]),
}
# Models for which LiteRT needs fixed sizes.
FIXED = {
    "LSTM": {"batch_size": 3, "sequence_length": 11},
    "Llama": {"sequence_length": 11},
    "Gemma": {"sequence_length": 11},
}


def feeds(shapes: Shapes, batch: int, size: int) -> Feeds:
    rng = np.random.default_rng(batch)
    full = {name: (batch, *(size if x is None else x for x in s)) for name, s in shapes.items()}
    return {
        name: rng.integers(0, 2, shape).astype("int32")
        if name in (*TOKENS, "segment_ids")
        else rng.normal(scale=3, size=shape).astype("float32")
        for name, shape in full.items()
    }


# --- Runtimes -------------------------------------------------------------------------------------


def run_onnx(file: Path, given: Feeds) -> Feeds:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, given), strict=True))


def run_litert(file: Path, given: Feeds) -> Feeds:
    return Interpreter(str(file)).get_signature_runner("serving_default")(**given)


EXPORTS: dict[str, tuple[Callable[..., Any], Callable[[Path, Feeds], Feeds]]] = {
    "onnx": (kl.export_onnx, run_onnx),
    "litert": (kl.export_litert, run_litert),
}
each_export = pytest.mark.parametrize("kind", list(EXPORTS))
