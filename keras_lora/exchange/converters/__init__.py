"""Which weight of a Hugging Face checkpoint each kernel of a KerasHub model is taken from.

KerasHub has a converter for each architecture. `hugging_face_weights` runs the converter of the
model's class with a recording loader (`recording`) that gives tensors without values (`tensors`)
instead of a checkpoint's, and finds out where each element went (`blocks`). So this package needs
no list of architectures.
"""

from keras_lora.exchange.converters.blocks import Block
from keras_lora.exchange.converters.converters import MissingFieldError
from keras_lora.exchange.converters.weights import (
    HuggingFaceWeights,
    WeightSource,
    hugging_face_weights,
)

__all__ = [
    "Block",
    "HuggingFaceWeights",
    "MissingFieldError",
    "WeightSource",
    "hugging_face_weights",
]
