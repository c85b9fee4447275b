"""KerasHub's `.lora.h5` files: this package reads KerasHub's, and KerasHub reads this package's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from support.cases import numpy_of
from support.keras_hub_backbones import BACKBONES
from support.keras_hub_files import (
    Deltas,
    assert_equal_deltas,
    backbone,
    enabled_layers,
    keras_deltas,
    our_deltas,
    random_factors,
    trained,
)

import keras_lora as kl
from keras_lora.exchange.keras_hub.adapter import keras_hub_factors, write_keras_hub_lora
from keras_lora.exchange.keras_hub.numbering import keras_hub_layers

pytest_plugins = ["support.keras_hub_files"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_there_and_back(name: str, file: Path) -> None:
    model = backbone(name)
    copy = backbone(name)
    copy.set_weights(model.get_weights())
    trained(model)
    if not enabled_layers(model):
        with pytest.raises(ValueError, match="no lora-enabled layers"):
            model.save_lora_weights(file)
        return
    model.save_lora_weights(file)
    factors = keras_hub_factors(copy, file)
    assert_equal_deltas(our_deltas(copy, factors), keras_deltas(model))

    assert write_keras_hub_lora(file, copy, factors) <= 2
    copy.load_lora_weights(file)
    assert_equal_deltas(keras_deltas(copy), keras_deltas(model))


@pytest.mark.parametrize("name", ["BertBackbone", "GPT2Backbone", "GemmaBackbone"])
@pytest.mark.parametrize("rank", [2, 3])
def test_kernels_are_those_of_keras(name: str, rank: int, file: Path) -> None:
    model = trained(backbone(name), rank)
    model.save_lora_weights(file)
    factors = keras_hub_factors(model, file)
    assert_equal_deltas(our_deltas(model, factors), keras_deltas(model))


def adapted_kernels(model: Any, name: str) -> Deltas:
    """Effective kernel minus base of each layer that has the adapter."""
    layers = {i: node.layer for i, node in keras_hub_layers(model).items()}
    return {
        i: numpy_of(v.kernel) - numpy_of(v.base_kernel)
        for i, v in layers.items()
        if isinstance(v, kl.LoRALayer) and name in v.adapters
    }


@pytest.mark.parametrize("name", ["BertBackbone", "GPT2Backbone", "GemmaBackbone"])
def test_a_file_becomes_an_adapter_and_an_adapter_a_file(name: str, file: Path) -> None:
    theirs = trained(backbone(name))
    theirs.save_lora_weights(file)
    ours = backbone(name)
    report = kl.load_keras_hub_lora(ours, file, "hub")
    assert_equal_deltas(adapted_kernels(ours, "hub"), keras_deltas(theirs))
    assert {layer.file_rank for layer in report} == {2}
    assert max(layer.rank for layer in report) > 2  # a factor for each head
    assert not any(layer.error for layer in report)
    with kl.scale_adapter(ours, "hub", 0.5):
        kl.save_keras_hub_lora(ours, file, "hub")
    fresh = backbone(name)
    fresh.load_lora_weights(file)
    halved = {i: delta / 2 for i, delta in keras_deltas(theirs).items()}
    assert_equal_deltas(keras_deltas(fresh), halved)


def test_an_adapter_is_truncated_as_well_as_can_be(file: Path) -> None:
    theirs = trained(backbone("BertBackbone"), 3)
    theirs.save_lora_weights(file)
    ours = backbone("BertBackbone")
    report = kl.load_keras_hub_lora(ours, file, rank=2)
    nodes = {node.path: i for i, node in keras_hub_layers(ours).items()}
    exact = keras_deltas(theirs)
    for layer in report:
        delta = exact[nodes[layer.path]]
        values = np.linalg.svd(delta.reshape(len(delta), -1), compute_uv=False)
        expected = np.linalg.norm(values[2:]) / np.linalg.norm(values)
        assert layer.rank == 2
        assert layer.error == pytest.approx(expected, rel=1e-4)
        received = adapted_kernels(ours, "default")[nodes[layer.path]]
        error = np.linalg.norm(received - delta) / np.linalg.norm(delta)
        assert error == pytest.approx(expected, rel=1e-3)
    wrong: list[dict[str, Any]] = [{"rank": 0}, {"name": "default"}, {"name": "a/b"}]
    for options in wrong:
        with pytest.raises(ValueError, match="rank|name"):
            kl.load_keras_hub_lora(ours, file, **options)


@pytest.mark.parametrize("name", ["BertBackbone", "GPT2Backbone", "GemmaBackbone"])
def test_factors_of_true_rank_load_into_keras_hub(name: str, file: Path) -> None:
    model = backbone(name)
    factors = random_factors(model, ["query", "value"])
    rank = write_keras_hub_lora(file, model, factors)
    model.load_lora_weights(file)
    assert_equal_deltas(keras_deltas(model), our_deltas(model, factors))
    assert {layer.lora_rank for layer in enabled_layers(model).values()} == {rank}


def test_scale_in_keras_hub_is_one() -> None:
    """The reason why the file needs no alpha."""
    for layer in enabled_layers(trained(backbone("BertBackbone"))).values():
        assert layer.lora_alpha == layer.lora_rank == 2


def test_other_layers_by_name(file: Path) -> None:
    names = ["attention_output", "feedforward_intermediate_dense"]
    model, copy = backbone("BertBackbone"), backbone("BertBackbone")
    copy.set_weights(model.get_weights())
    trained(model, names=names).save_lora_weights(file)
    factors = keras_hub_factors(copy, file)
    assert_equal_deltas(our_deltas(copy, factors), keras_deltas(model))

    rank = write_keras_hub_lora(file, copy, factors, target_layer_names=names)
    copy.enable_lora(rank, target_layer_names=names)
    copy.load_lora_weights(file)
    assert_equal_deltas(keras_deltas(copy), keras_deltas(model))


def test_layers_without_factors_are_zeros_of_the_rank_asked_for(file: Path) -> None:
    model = backbone("BertBackbone")
    factors = random_factors(model, ["query"], rank=1)
    assert write_keras_hub_lora(file, model, factors, rank=11) == 11
    model.enable_lora(11)
    model.load_lora_weights(file)
    ours, theirs = our_deltas(model, factors), keras_deltas(model)
    assert {layer.name for layer in enabled_layers(model).values()} == {"query", "value"}
    assert not any(theirs[i].any() for i in theirs.keys() - ours.keys())
    assert_equal_deltas(ours, {i: theirs[i] for i in ours})


def test_a_task_holds_a_backbone(file: Path) -> None:
    inner = trained(backbone("BertBackbone"))
    inner.save_lora_weights(file)
    task = keras_hub.models.BertTextClassifier(inner, num_classes=2)
    of_backbone, of_task = keras_hub_factors(inner, file), keras_hub_factors(task, file)
    assert list(of_task) == [f"{inner.name}/{path}" for path in of_backbone]
    write_keras_hub_lora(file, task, of_task)
    inner.load_lora_weights(file)


def test_numbers_stay_when_a_model_is_adapted() -> None:
    model = backbone("GemmaBackbone")
    before = {i: node.path for i, node in keras_hub_layers(model).items()}
    kl.apply_lora(model, kl.LoRAConfig(rank=2, dropout=0.1))
    assert {i: node.path for i, node in keras_hub_layers(model).items()} == before


def test_a_model_without_one_backbone_is_refused() -> None:
    first, second = backbone("BertBackbone"), backbone("BertBackbone")
    second.name = "other"
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="a KerasHub backbone, or a model that contains one"):
        keras_hub_layers(model)
    owner = keras.layers.Layer()
    owner.parts = [first, second]
    with pytest.raises(ValueError, match="other.*; pass the backbone itself"):
        keras_hub_layers(owner)
