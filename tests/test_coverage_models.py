"""Keras applications and KerasHub tasks are adapted; each passes through `check_adapting`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import keras_nlp
import numpy as np
import pytest
from keras.src.backend.common import global_state
from support.adapting import check_adapting, paths, projections
from support.cases import randomize

import keras_lora as kl

pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes a GradientTape"),
    # Some kernels of the backbones have a side of one.
    pytest.mark.filterwarnings("ignore:The rank is above:UserWarning"),
]


# --- Keras applications ---------------------------------------------------------------------------

APPLICATIONS = sorted(
    name for name, value in vars(keras.applications).items() if inspect.isfunction(value)
)
SIDES = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}  # their smallest inputs
# Of each family one is adapted, up to a layer after all its kinds of blocks; two are adapted whole.
ENDS = {
    "ConvNeXtTiny": "convnext_tiny_stage_0_block_0_identity",
    "DenseNet121": "conv2_block2_concat",
    "EfficientNetB0": "block2a_project_bn",
    "EfficientNetV2B0": "block4a_project_bn",
    "InceptionResNetV2": "mixed_5b",
    "InceptionV3": "mixed0",
    "MobileNet": "conv_pw_4_relu",
    "MobileNetV2": "predictions",
    "MobileNetV3Small": "expanded_conv_2_add",
    "NASNetMobile": "reduction_add4_stem_1",
    "ResNet50": "conv2_block2_out",
    "ResNet50V2": "conv2_block2_out",
    "VGG16": "predictions",
    "Xception": "block3_sepconv2_act",
}
CONVOLUTIONS = (
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv2D,
)
HEADS = re.compile("predictions|conv_preds|logits|.*_head_dense")


def application(name: str) -> keras.Model:
    """The model with its shapes, and without values in its variables."""
    side = SIDES.get(name, 32)
    options: dict[str, Any] = {"input_shape": (side, side, 3), "classes": 7}
    options |= {"alpha": 0.35} if name == "MobileNetV2" else {}
    with keras.StatelessScope(initialize_variables=False):
        model = getattr(keras.applications, name)(
            weights=None, classifier_activation=None, **options
        )
    # Otherwise Keras gives them values after the next layer that it calls on symbols.
    global_state.set_global_attribute("uninitialized_variables", [])
    return model


def assert_all(model: keras.Model) -> None:
    """`"convolutions"` and `"all"` select all but the layer that makes the output."""
    inside = [x for x in model._flatten_layers() if not HEADS.fullmatch(x.name)]
    convolutions = {x.name for x in inside if type(x) in CONVOLUTIONS}
    assert {t.layer.name for t in kl.find_targets(model, "convolutions")} == convolutions
    dense = {x.name for x in inside if type(x) is keras.layers.Dense}
    assert {t.layer.name for t in kl.find_targets(model, "all")} == convolutions | dense


def assert_linear(name: str, model: keras.Model) -> None:
    """`"all-linear"` selects dense layers inside, or says what is there in their place."""
    if name.startswith(("ConvNeXt", "VGG")):
        assert "predictions" not in paths(model)
        return
    without = ("MobileNet", "MobileNetV3Large", "MobileNetV3Small")
    message = r"output head \['predictions'\].*Write targets='all'"
    if name in without:
        message = "targets='all-linear', which matches none"
    with pytest.raises(ValueError, match=message):
        kl.find_targets(model)


# A beginning of an application may end in several convolutions.
@pytest.mark.filterwarnings("ignore:targets='all' adapts:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_application(name: str) -> None:
    model = application(name)
    assert_linear(name, model)
    assert_all(model)
    if name in ENDS:
        check_application(model, ENDS[name])


def check_application(model: keras.Model, end: str) -> None:
    beginning = keras.Model(model.input, model.get_layer(end).output)
    kinds = [{t.kind for t in kl.find_targets(m, "all")} for m in (beginning, model)]
    assert kinds[0] == kinds[1]
    targets = paths(beginning, "all")
    if end == "predictions":
        targets = [*targets, end]  # the head too, which only its name selects
    x = np.random.default_rng(1).uniform(0, 255, size=(2, *model.input.shape[1:]))
    check_adapting(keras.models.clone_model(beginning), x.astype("float32"), targets)


# --- KerasHub and KerasNLP ------------------------------------------------------------------------


def bert_classifier() -> keras.Model:
    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=19,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=7,
        name="bert",
    )
    return keras_nlp.models.BertTextClassifier(backbone, num_classes=3, preprocessor=None)


def gemma_lm() -> keras.Model:
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=19,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
        head_dim=6,
        name="gemma",
    )
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)


def llama_lm(tied: bool) -> keras.Model:
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=19,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
        tie_word_embeddings=tied,
        name="llama",
    )
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


def gpt2_lm() -> keras.Model:
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=19,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=7,
        name="gpt2",
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def blocks(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}_{i}/{name}" for i in range(2) for name in names]


BERT, GEMMA = "bert/transformer_layer", "gemma/decoder_block"
BERT_DENSE = ("feedforward_intermediate_dense", "feedforward_output_dense")
GEMMA_DENSE = ("ffw_gating", "ffw_gating_2", "ffw_linear")
# A function that makes the model, the paths that "attention" finds, and the other paths that
# "all-linear" finds.
TASKS: dict[str, tuple[Callable[[], keras.Model], list[str], list[str]]] = {
    "BertTextClassifier of keras_nlp": (
        bert_classifier,
        blocks(BERT, *projections("self_attention_layer")),
        [*blocks(BERT, *BERT_DENSE), "bert/pooled_dense"],
    ),
    "GemmaCausalLM of keras_hub": (
        gemma_lm,
        blocks(GEMMA, *projections("attention")),
        blocks(GEMMA, *GEMMA_DENSE),
    ),
}


def task(name: str) -> tuple[keras.Model, dict[str, np.ndarray]]:
    return with_inputs(TASKS[name][0]())


def with_inputs(model: keras.Model) -> tuple[keras.Model, dict[str, np.ndarray]]:
    ids = np.random.default_rng(1).integers(1, 19, size=(2, 7)).astype("int32")
    inputs = {
        "token_ids": ids,
        "padding_mask": np.ones_like(ids),
        "segment_ids": np.zeros_like(ids),
    }
    return model, {key: inputs[key] for key in model.input}


@pytest.mark.parametrize("name", TASKS)
def test_task(name: str) -> None:
    model, inputs = task(name)
    _, attention, other = TASKS[name]
    assert set(paths(model)) == {*attention, *other}
    check_adapting(model, inputs)


@pytest.mark.parametrize("name", TASKS)
def test_task_attention_alone(name: str) -> None:
    model, inputs = task(name)
    assert paths(model, "attention") == TASKS[name][1]
    check_adapting(model, inputs, "attention")


# A model with its head, and the embeddings that "all" adds.
TABLES: dict[str, tuple[Callable[[], keras.Model], set[str]]] = {
    "bert": (bert_classifier, {"bert/token_embedding", "bert/segment_embedding"}),
    "llama": (lambda: llama_lm(tied=False), {"llama/token_embedding"}),
    "llama, tied": (lambda: llama_lm(tied=True), {"llama/token_embedding"}),
    "gemma, tied": (gemma_lm, {"gemma/token_embedding"}),
    "gpt2, tied": (gpt2_lm, {"gpt2/token_embedding"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_embeddings(name: str) -> None:
    make, tables = TABLES[name]
    model, inputs = with_inputs(make())
    assert set(paths(model, "all")) == {*paths(model), *tables}
    check_adapting(model, inputs, "all")


def test_adapted_tables_generate_what_merged_ones_do() -> None:
    model, inputs = with_inputs(gpt2_lm())
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["token_embedding"]))
    randomize(f for x in kl.lora_layers(model).values() for f in x.adapters["default"].factors)
    prompt = {key: value[:, :3] for key, value in inputs.items()}
    prompt = {key: np.pad(value, ((0, 0), (0, 4))) for key, value in prompt.items()}
    model.compile(sampler="greedy")
    adapted = model.generate(prompt, stop_token_ids=None)
    merged = kl.merge_lora(model).generate(prompt, stop_token_ids=None)
    np.testing.assert_array_equal(adapted["token_ids"], merged["token_ids"])
