"""SmolLM2-135M-Instruct with the same weights in KerasHub and in transformers.

Its matrices are quantized to 4 bits in the file that `assets` brings. transformers reads that file
and saves the float32 weights as a plain Hugging Face directory (542 MB), which both libraries
load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import assets
import keras
import keras_hub
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

END_TOKEN = 2

logging.disable_progress_bar()


def checkpoint() -> Path:
    """The Hugging Face directory."""
    source = assets.smollm2()

    def convert(workspace: Path) -> Path:
        return _dequantize(source, workspace / "dequantized")

    return assets.cached(f"{source.parent.name}-float32", convert)


def in_keras() -> keras.Model:
    """The model without a preprocessor: both libraries get the same tokens."""
    epsilon = json.loads((checkpoint() / "config.json").read_text())["rms_norm_eps"]
    # KerasHub's Llama converter ignores this field, and the backbone's default is another number.
    backbone = keras_hub.models.Llama3Backbone.from_preset(
        str(checkpoint()), layer_norm_epsilon=epsilon
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


def in_torch() -> Any:
    return LlamaForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)


def tokenizer() -> keras.layers.Layer:
    return keras_hub.models.Llama3Tokenizer.from_preset(str(checkpoint()))


def _dequantize(source: Path, folder: Path) -> Path:
    options = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    read = LlamaForCausalLM.from_pretrained(**options, dtype=torch.float32)
    config = read.config
    # The weights are quantized no longer, so transformers would refuse to save them with this.
    del config.quantization_config
    plain = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**options).save_pretrained(folder)
    return folder
