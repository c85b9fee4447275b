"""Keras applications and KerasHub tasks are adapted; each passes through `check_adapting`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import keras_nlp
import numpy as np
import pytest
from support.adapting import check_adapting, paths, projections
from support.cases import randomize

import keras_lora as kl

pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes a GradientTape"),
    # Some kernels of the backbones have a side of one.
    pytest.mark.filterwarnings("ignore:The rank is above:UserWarning"),
]


# --- Keras applications ---------------------------------------------------------------------------

APPLICATIONS: dict[str, dict[str, Any]] = {
    "ConvNeXtTiny": {},
    "DenseNet121": {},
    "EfficientNetB0": {},
    "EfficientNetV2B0": {},
    "InceptionResNetV2": {"input_shape": (75, 75, 3)},
    "InceptionV3": {"input_shape": (75, 75, 3)},
    "MobileNetV2": {"alpha": 0.35},
    "NASNetMobile": {},
    "ResNet50": {},
    "ResNet50V2": {},
    "VGG16": {},
    "VGG19": {},
    "Xception": {"input_shape": (71, 71, 3)},
}
CONVOLUTIONS = (
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv2D,
)
WITH_DENSE_INSIDE = {"ConvNeXtTiny", "VGG16", "VGG19"}


def application(name: str) -> tuple[keras.Model, np.ndarray]:
    options: dict[str, Any] = {"input_shape": (32, 32, 3), "classes": 7}
    options |= APPLICATIONS.get(name, {})
    model = getattr(keras.applications, name)(weights=None, classifier_activation=None, **options)
    x = np.random.default_rng(1).uniform(0, 255, size=(2, *options["input_shape"]))
    return model, x.astype("float32")


def assert_convolutions(model: keras.Model) -> None:
    """`"convolutions"` selects all but the one that makes the output."""
    every = [x.name for x in model._flatten_layers() if type(x) in CONVOLUTIONS]
    heads = {"conv_preds", "logits"}  # of the applications that end in a convolution
    found = {t.layer.name for t in kl.find_targets(model, "convolutions")}
    assert found == {*every} - heads


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_application(name: str) -> None:
    model, inputs = application(name)
    if name in WITH_DENSE_INSIDE:
        assert "predictions" not in paths(model)
        assert_convolutions(model)
        check_adapting(model, inputs)
        return
    with pytest.raises(ValueError, match=r"output head \['predictions'\].*Write targets='all'"):
        kl.find_targets(model)
    assert_convolutions(model)
    # One application with all its convolutions; the step of a large one takes long to trace.
    check_adapting(model, inputs, "convolutions" if name == "MobileNetV2" else ["predictions"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNet", "MobileNetV3Small"])
def test_application_without_dense(name: str) -> None:
    model, _ = application(name)
    with pytest.raises(ValueError, match="targets='all-linear', which matches none"):
        kl.find_targets(model)
    assert_convolutions(model)


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
