"""Which Hugging Face weight each kernel is, for every architecture that KerasHub converts."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from keras_hub.src.utils.transformers.safetensor_utils import SafetensorLoader
from support.hugging_face_models import HUGGING_FACE_MODELS, NEEDS_CONFIG, UNREADABLE
from support.weight_blocks import assert_same, matrices

import keras_lora as kl
from keras_lora.exchange.converters import hugging_face_weights
from keras_lora.exchange.converters.converters import PRESET_LOADER, converter_modules
from keras_lora.walker import walk

SWIN = [f"stage_{i}/blocks_{j}/attn/attention_qkv" for i in range(2) for j in range(2)]
REFUSED = {
    "swin": dict.fromkeys(SWIN, "made of several weights"),
    "blip-2": {"patching_and_embedding/position_embedding": "a bare parameter"},
    "vit": {"patching_and_embedding/position_embedding": "3 axes instead of a matrix"},
}
# KerasHub's converter of Mistral rounds to float16.
ROUNDED = {"mistral"}
# Variables that are not one weight: fused experts, sums, and matrices that the model computes.
WITHOUT_ORIGIN = {
    "dinov2": ["interpolated_position_embeddings"],
    "gpt_oss": ["experts/gate_up_proj", "experts/down_proj"],
    "mixtral": [
        "expert_feedforward_gate_dense",
        "expert_feedforward_intermediate_dense",
        "expert_feedforward_output_dense",
    ],
    "qwen2_moe": ["expert_feedforward_gate_dense", "expert_feedforward_output_dense"],
    "qwen3_moe": ["expert_feedforward_gate_dense", "expert_feedforward_output_dense"],
    "smollm3": ["inv_freq"],
    "swin": ["attention_qkv/bias"],
    "t5gemma": ["decoder_token_embedding/reverse_embeddings"],
    "xlm-roberta": ["position_embedding/embeddings"],
}
# transformers 5 writes experts one by one, and has them in one tensor; the converter reads both.
UNFUSED = {"qwen3_5_moe": ("experts.gate_up_proj", "experts.down_proj")}
# The errors of `from_preset` for files of transformers that KerasHub 0.32 cannot read.
ERRORS = {
    "albert without pooler": "albert.pooler.weight",
    "bart": "num_hidden_layers",
    "bert without pooler": "pooler.dense.weight",
    "esm": "encoder.layer.0.attention.LayerNorm.weight",
    "gemma3": "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "gpt_oss": "experts.gate_up_proj_blocks",
    "paligemma": "vision_tower.vision_model.embeddings.patch_embedding.bias",
    "qwen3_5_text": "no converter .*qwen3_5_text",
    "qwen3_moe": "num_experts",
    "t5gemma2": "vision_tower.vision_model.embeddings.patch_embedding.weight",
}
# A warning of KerasHub's Swin.
pytestmark = pytest.mark.filterwarnings("ignore:Layer 'attn':UserWarning")


@pytest.fixture(params=HUGGING_FACE_MODELS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    HUGGING_FACE_MODELS[name](path)
    return path


@pytest.fixture(scope="module")
def backbone(directory: Path) -> keras.Model:
    return keras_hub.models.Backbone.from_preset(str(directory), dtype="float32")


def test_kernels_are_the_blocks_of_the_weights(
    name: str, directory: Path, backbone: keras.Model
) -> None:
    before = [np.array(v) for v in backbone.variables]
    weights = hugging_face_weights(backbone, NEEDS_CONFIG.get(name))
    assert all("assign" not in vars(v) for v in backbone.variables)
    for variable, value in zip(backbone.variables, before, strict=True):
        np.testing.assert_array_equal(np.array(variable), value)

    layers = {node.path: node.layer for node in walk(backbone)}
    assert set(weights.blocks) | set(weights.refused) >= {t.path for t in kl.find_targets(backbone)}
    with SafetensorLoader(str(directory)) as loader:
        for path, blocks in weights.blocks.items():
            for block, kernel in zip(blocks, matrices(layers[path]), strict=True):
                tensor = loader.get_tensor(block.weight)
                assert tensor.shape == block.shape[:: -1 if block.stored_transposed else 1], path
                if name in ROUNDED:
                    tensor = tensor.astype("float16").astype("float32")
                np.testing.assert_array_equal(block.read(tensor), kernel, path)


def test_the_model_type(directory: Path, name: str, backbone: keras.Model) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert hugging_face_weights(backbone, NEEDS_CONFIG.get(name)).model_type == config["model_type"]


def test_what_is_refused(name: str, backbone: keras.Model) -> None:
    refused = hugging_face_weights(backbone, NEEDS_CONFIG.get(name)).refused
    expected = REFUSED.get(name, {})
    assert len(refused) == len(expected)
    # Only the endings of paths, since Keras numbers some layers over all models.
    for ending, reason in expected.items():
        assert [r for path, r in refused.items() if path.endswith(ending) and reason in r]


def test_other_variables(name: str, directory: Path, backbone: keras.Model) -> None:
    others = hugging_face_weights(backbone, NEEDS_CONFIG.get(name)).others
    variables = {f"{n.path}/{v.name}": v for n in walk(backbone) for v in n.layer.weights}
    without = {path for path, origin in others.items() if origin is None}
    endings = WITHOUT_ORIGIN.get(name, [])
    assert without == {path for path in others if path.endswith(tuple(endings))}
    assert all(any(path.endswith(ending) for path in without) for ending in endings)
    with SafetensorLoader(str(directory)) as loader:
        for path, origin in others.items():
            if origin is not None and not origin.weight.endswith(UNFUSED.get(name, ("no name",))):
                tensor = loader.get_tensor(origin.weight)
                if name in ROUNDED:
                    tensor = tensor.astype("float16").astype("float32")
                received = tensor.reshape(-1)[origin.index()]
                np.testing.assert_array_equal(received, np.array(variables[path]), path)


def test_a_model_built_by_hand_has_the_same_blocks(name: str, backbone: keras.Model) -> None:
    by_hand = type(backbone).from_config(backbone.get_config())
    config = NEEDS_CONFIG.get(name)
    assert_same(hugging_face_weights(by_hand, config), hugging_face_weights(backbone, config))


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_keras_hub_cannot_read(name: str, tmp_path: Path) -> None:
    UNREADABLE[name](tmp_path)
    with pytest.raises(Exception, match=ERRORS[name]):
        keras_hub.models.Backbone.from_preset(str(tmp_path))


def test_every_converter_of_keras_hub_is_found() -> None:
    """Their model types are read from code, which may change its form."""
    package = importlib.import_module(PRESET_LOADER.rpartition(".")[0])
    names = {m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("convert")}
    modules = converter_modules()
    assert {module.__name__.rpartition(".")[2] for module in modules.values()} == names
    assert len(modules) > len(names)  # Gemma's converter, for example, is for two model types
