"""Small configurations of the KerasHub backbones that have Dense or EinsumDense layers.

`BACKBONES` maps the name of a backbone class to a factory that takes no arguments and returns
`(model, inputs)`: a randomly initialised float32 model of about two layers, and deterministic
numpy inputs for a batch of two that `model(inputs)` accepts. Every model has at least one
`keras.layers.Dense` or `keras.layers.EinsumDense` somewhere inside. Purely convolutional
backbones (ResNet, EfficientNet, MobileNet, ...) are in `CONVOLUTIONAL`.

Sizes are tiny, and differ from each other wherever the architecture lets them, so that a mix-up
of axes shows up as an error of shape. No module of this folder knows about LoRA.
"""

from __future__ import annotations

from support.keras_hub_backbones.convolutional import CONVOLUTIONAL
from support.keras_hub_backbones.decoders import DECODERS
from support.keras_hub_backbones.encoder_decoders import ENCODER_DECODERS
from support.keras_hub_backbones.encoders import ENCODERS
from support.keras_hub_backbones.gemma import GEMMAS
from support.keras_hub_backbones.multimodal import MULTIMODAL
from support.keras_hub_backbones.vision import SPEECH, VECTORS, VISION

__all__ = ["BACKBONES", "CONVOLUTIONAL"]

BACKBONES = ENCODERS | DECODERS | ENCODER_DECODERS | VISION | SPEECH | MULTIMODAL | GEMMAS | VECTORS
