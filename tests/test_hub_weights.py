"""Which Hugging Face weight each kernel is, for every architecture that KerasHub converts."""

from __future__ import annotations

import importlib
import json
import pkgutil
import tracemalloc
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from hub_models import HIDDEN, HUB_MODELS, UNREADABLE
from keras_hub.src.utils.transformers.safetensor_utils import SafetensorLoader
from kerashub_backbones import BACKBONES

import keras_lora as kl
from keras_lora.exchange.converters import (
    Block,
    HuggingFaceWeights,
    MissingFieldError,
    hugging_face_weights,
)
from keras_lora.exchange.converters.blocks import ConvertedKernel, Locator, RefusedError
from keras_lora.exchange.converters.converters import PRESET_LOADER, converter_modules
from keras_lora.exchange.converters.tensors import Weight
from keras_lora.layers import base_kernel, split_kernel
from keras_lora.lowrank.equations import split_equation
from keras_lora.walker import walk

SWIN = [f"stage_{i}/blocks_{j}/attn/attention_qkv" for i in range(2) for j in range(2)]
REFUSED = {
    "swin": dict.fromkeys(SWIN, "made of several weights"),
    "blip-2": {"patching_and_embedding/position_embedding": "a bare parameter"},
    "vit": {"patching_and_embedding/position_embedding": "3 axes instead of a matrix"},
}
# KerasHub's converter of Mistral rounds to float16.
ROUNDED = {"mistral"}
# Variables that are not one weight: fused experts, sums, tables that the model computes.
WITHOUT_ORIGIN = {
    "dinov2": ["interpolated_position_embeddings"],
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
# transformers 5 writes them one by one, and computes with all in one; the converter reads both.
UNFUSED = {"qwen3_5_moe": ("experts.gate_up_proj", "experts.down_proj")}
# KerasHub's converter reads there which language model it has.
NEEDS_CONFIG = {"blip-2": {"text_config": {"model_type": "opt"}}}
# `from_preset` of transformers' files that KerasHub 0.32 cannot read.
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
# Of KerasHub's Swin.
pytestmark = pytest.mark.filterwarnings("ignore:Layer 'attn':UserWarning")


@pytest.fixture(params=HUB_MODELS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    HUB_MODELS[name](path)
    return path


@pytest.fixture(scope="module")
def backbone(directory: Path) -> keras.Model:
    return keras_hub.models.Backbone.from_preset(str(directory), dtype="float32")


def matrices(layer: keras.layers.Layer) -> np.ndarray[Any, Any]:
    """A kernel as `(shared, in, out)`."""
    split, kernel = split_kernel(layer), np.array(base_kernel(layer))
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
    # Endings, since Keras numbers some layers over all models.
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


def gpt2(hidden_dim: int = HIDDEN) -> keras.Model:
    return keras_hub.models.GPT2Backbone(
        vocabulary_size=11, num_layers=1, num_heads=3, hidden_dim=hidden_dim, intermediate_dim=5
    )


def test_a_fused_matrix_is_known_as_a_whole() -> None:
    weights = hugging_face_weights(gpt2())
    for i, part in enumerate(["query", "key", "value"]):
        (block,) = weights.blocks[f"transformer_layer_0/self_attention/{part}"]
        assert block.weight == "h.0.attn.c_attn.weight"
        assert (block.shape, block.stored_transposed) == ((3 * HIDDEN, HIDDEN), True)
        assert block.rows.tolist() == list(range(i * HIDDEN, (i + 1) * HIDDEN))
        assert block.columns.tolist() == list(range(HIDDEN))
        bias = weights.others[f"transformer_layer_0/self_attention/{part}/bias"]
        assert bias is not None
        assert bias.shape == (3 * HIDDEN,)
        assert bias.index().reshape(-1).tolist() == block.rows.tolist()


def test_an_adapted_model_has_the_same_blocks() -> None:
    backbone = gpt2()
    plain = hugging_face_weights(backbone)
    kl.apply_lora(backbone, kl.LoRAConfig(rank=2, targets="all-linear"))
    adapted = hugging_face_weights(backbone)
    assert_same(adapted, plain)
    assert set(adapted.others) == set(plain.others)
    assert all(layer.slots for layer in kl.lora_layers(backbone).values())


def test_a_model_around_a_backbone() -> None:
    backbone = gpt2()
    task = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    inside, plain = hugging_face_weights(task).blocks, hugging_face_weights(backbone).blocks
    assert {p.partition("/")[2]: [b.weight for b in x] for p, x in inside.items()} == {
        p: [b.weight for b in x] for p, x in plain.items()
    }


def test_the_head_of_a_classifier() -> None:
    backbone, _ = BACKBONES["ViTBackbone"]()
    task = keras_hub.models.ViTImageClassifier(backbone=backbone, num_classes=5, preprocessor=None)
    (block,) = hugging_face_weights(task).blocks["predictions"]
    assert (block.weight, block.shape, block.stored_transposed) == (
        "classifier.weight",
        (5, backbone.hidden_dim),
        False,
    )


def test_a_head_that_is_not_converted_is_refused() -> None:
    backbone, _ = BACKBONES["BertBackbone"]()
    task = keras_hub.models.BertTextClassifier(backbone=backbone, num_classes=5, preprocessor=None)
    assert hugging_face_weights(task).refused == {"logits": "the converter loads no weight into it"}


def test_a_model_type_with_images_is_told_from_one_without() -> None:
    backbone, _ = BACKBONES["Gemma3Backbone"]()
    weights = hugging_face_weights(backbone)
    assert weights.model_type == "gemma3"
    prefixes = {b.weight.split(".layers.")[0] for x in weights.blocks.values() for b in x}
    assert "model.language_model" in prefixes
    assert hugging_face_weights(backbone, model_type="gemma3_text").model_type == "gemma3_text"


def test_packed_experts_do_not_stop_the_attention_of_later_layers() -> None:
    backbone, _ = BACKBONES["GptOssBackbone"]()
    weights = hugging_face_weights(backbone)
    assert not weights.refused
    packed = {path for path, origin in weights.others.items() if origin is None}
    assert packed == {p for p in weights.others if p.endswith(("gate_up_proj", "down_proj"))}


def test_a_converter_that_asks_for_the_kind_of_a_norm() -> None:
    backbone, _ = BACKBONES["Gemma3nBackbone"]()
    assert not hugging_face_weights(backbone).refused


def test_a_converter_does_not_print(capsys: pytest.CaptureFixture[str]) -> None:
    hugging_face_weights(BACKBONES["Qwen3_5Backbone"]()[0])
    assert capsys.readouterr().out == ""


def test_kernels_with_adapters_of_keras_are_refused() -> None:
    backbone = gpt2()
    backbone.enable_lora(rank=2)
    enabled = {f"transformer_layer_0/self_attention/{x}" for x in ["query", "value"]}
    assert set(hugging_face_weights(backbone).refused) == enabled


def test_a_field_that_a_backbone_does_not_hold_is_asked_for() -> None:
    backbone, _ = BACKBONES["BLIP2Backbone"]()
    with pytest.raises(MissingFieldError, match=r"convert_blip2 reads its field 'text_config'"):
        hugging_face_weights(backbone)
    assert all("assign" not in vars(v) for v in backbone.variables)
    assert hugging_face_weights(backbone, NEEDS_CONFIG["blip-2"]).blocks


def test_a_given_configuration_counts() -> None:
    assert not hugging_face_weights(gpt2(), {"model_type": "gpt2"}).refused
    refused = hugging_face_weights(gpt2(), {"n_embd": HIDDEN + 1}).refused
    assert set(refused) == {f"transformer_layer_0/self_attention/{x}" for x in ["query", "key"]}


def test_slices_that_contradict_each_other_are_refused() -> None:
    kernel = ConvertedKernel(Weight("w")[:, 4:].reshape(3, 5), split_equation("bd,df->bf"), (3, 5))
    with pytest.raises(RefusedError, match="contradict"):
        Locator().blocks(kernel, {"w": (3, 11)})


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: BACKBONES["ElectraBackbone"]()[0], {}, "ElectraBackbone.*the model types are"),
        (gpt2, {"model_type": "llama"}, "converter of llama loads"),
        (lambda: keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), {}, "backbone"),
    ],
)
def test_models_without_a_converter(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hugging_face_weights(make(), **settings)


def test_layers_behind_the_place_where_a_converter_stops_are_refused() -> None:
    backbone, _ = BACKBONES["Qwen3MoeBackbone"]()  # its dense layer is named otherwise
    refused = hugging_face_weights(backbone).refused
    assert "transformer_layer_1/self_attention/query" in refused
    assert all("_feedforward_intermediate_dense" in reason for reason in refused.values())


# --- Hooks, one by one: what a hook makes of a weight `x` for a kernel `(d, n, h)` -----------

D, N, H = 5, 3, 2
HOOKS: dict[str, tuple[Any, tuple[int, int], bool, list[int]]] = {
    "linear": (lambda x: x.T.reshape(D, N, H), (N * H, D), False, [0, 1, 2, 3, 4, 5]),
    "conv1d": (lambda x: np.reshape(x, (D, N, H)), (N * H, D), True, [0, 1, 2, 3, 4, 5]),
    "float16": (
        lambda x: np.reshape(np.transpose(x.astype("float16")), (D, N, -1)),
        (N * H, D),
        False,
        [0, 1, 2, 3, 4, 5],
    ),
    "permuted": (
        lambda x: x.T.reshape(D, H, N).transpose(0, 2, 1),
        (N * H, D),
        False,
        [0, 3, 1, 4, 2, 5],
    ),
    "slice": (
        lambda x: x[4 : 4 + N * H].T.reshape(D, N, H),
        (4 + N * H, D),
        False,
        [4, 5, 6, 7, 8, 9],
    ),
    "rest": (lambda x: x[:, 4:].reshape(D, N, H), (4 + N * H, D), True, [4, 5, 6, 7, 8, 9]),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks(hook: str) -> None:
    function, shape, transposed, rows = HOOKS[hook]
    kernel = ConvertedKernel(function(Weight("w")), split_equation("bd,dnh->bnh"), (D, N, H))
    (block,) = Locator().blocks(kernel, Locator().shapes(kernel))
    assert (block.shape, block.stored_transposed) == (shape, transposed)
    assert block.rows.tolist() == rows
    assert block.columns.tolist() == list(range(D))
    tensor = np.random.default_rng(0).normal(size=shape[::-1] if transposed else shape)
    expected = function(tensor).reshape(D, N * H)
    assert np.allclose(block.read(tensor), expected, atol=1e-3 if hook == "float16" else 0)


REFUSED_HOOKS: dict[str, tuple[Any, str]] = {
    "scaled": (lambda x: 2 * x.T.reshape(D, N, H), "computed with multiply"),
    "sum": (lambda x: (x + Weight("v")).T.reshape(D, N, H), "computed with add"),
    "unknown": (lambda x: np.flip(x.T.reshape(D, N, H), 0), "computed with flip"),
    "scrambled": (lambda x: x.T.reshape(N, D, H).transpose(1, 0, 2), "not the columns"),
    "sizes": (lambda x: x.T.reshape(D, N, H + 1), "no matrix that has as many"),
    "vector": (lambda x: x.reshape(-1)[: D * N * H].reshape(D, N, H), "no matrix"),
    "fused": (
        lambda x: np.concatenate([x, Weight("v"), Weight("u")], 1).reshape(D, N, H),
        "made of several weights: w, v, u",
    ),
}


@pytest.mark.parametrize("hook", REFUSED_HOOKS)
def test_hooks_that_are_refused(hook: str) -> None:
    function, message = REFUSED_HOOKS[hook]
    kernel = ConvertedKernel(function(Weight("w")), split_equation("bd,dnh->bnh"), (D, N, H))
    with pytest.raises(RefusedError, match=message):
        Locator().shapes(kernel)


def test_experts_have_a_block_each() -> None:
    experts = [Weight(f"experts.{i}.weight") for i in range(3)]
    stacked: Any = np.stack([np.transpose(w) for w in experts])
    kernel = ConvertedKernel(stacked, split_equation("ebd,edf->ebf"), (3, 5, 7))
    blocks = Locator().blocks(kernel, Locator().shapes(kernel))
    assert [(b.weight, b.shape) for b in blocks] == [(w.key, (7, 5)) for w in experts]


def test_a_table_of_tokens_is_located_without_an_index_for_each_element() -> None:
    vocabulary, dim = 128_256, 4096
    kernel = ConvertedKernel(Weight("w"), split_equation("...x,xy->...y"), (vocabulary, dim))
    tracemalloc.start()
    (block,) = Locator().blocks(kernel, Locator().shapes(kernel))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (block.shape, block.stored_transposed) == ((dim, vocabulary), True)
    assert (len(block.rows), len(block.columns)) == (dim, vocabulary)
    assert peak < 2**24


def test_kernels_of_one_form_are_located_once() -> None:
    locator = Locator()
    for key in "vw":
        kernel = ConvertedKernel(Weight(key).T, split_equation("bd,df->bf"), (5, 7))
        (block,) = locator.blocks(kernel, locator.shapes(kernel))
        assert block.weight == key
    assert len(locator.found) == 1


def test_every_converter_of_keras_hub_is_found() -> None:
    """Their model types are read from code, which may change its form."""
    package = importlib.import_module(PRESET_LOADER.rpartition(".")[0])
    names = {m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("convert")}
    modules = converter_modules()
    assert {module.__name__.rpartition(".")[2] for module in modules.values()} == names
    assert len(modules) > len(names)  # Gemma's converter, for example, is of two model types
