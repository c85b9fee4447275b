"""Which Hugging Face weight each kernel is, in adapted models, tasks, and models by hand."""

from __future__ import annotations

from typing import Any

import keras
import keras_hub
import pytest
from support.hugging_face_models import HIDDEN, NEEDS_CONFIG
from support.keras_hub_backbones import BACKBONES
from support.weight_blocks import assert_same

import keras_lora as kl
from keras_lora.exchange.converters import MissingFieldError, hugging_face_weights
from keras_lora.exchange.converters.blocks import ConvertedKernel, Locator, RefusedError
from keras_lora.exchange.converters.tensors import Weight
from keras_lora.lowrank.equations import split_equation

# A warning of KerasHub's Swin.
pytestmark = pytest.mark.filterwarnings("ignore:Layer 'attn':UserWarning")


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
    with pytest.raises(MissingFieldError, match=r"field 'text_config'.*convert_blip2 reads"):
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
    backbone, _ = BACKBONES["Qwen3MoeBackbone"]()  # the converter expects another name
    refused = hugging_face_weights(backbone).refused
    assert "transformer_layer_1/self_attention/query" in refused
    assert all("_feedforward_intermediate_dense" in reason for reason in refused.values())
