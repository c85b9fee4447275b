"""KerasHub's files and models that do not fit together: every mismatch is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
import pytest
from support.keras_hub_files import CONVOLUTION, backbone, numbers, random_factors, trained, vit

import keras_lora as kl
from keras_lora.checks import AdapterFileError
from keras_lora.exchange.keras_hub.adapter import keras_hub_factors, write_keras_hub_lora
from keras_lora.exchange.keras_hub.numbering import (
    keras_hub_layers,
    match_keras_hub_layers,
    matrix_shape,
)
from keras_lora.lowrank.per_axis import Pair

pytest_plugins = ["support.keras_hub_files"]


def fresh_pairs(model: Any, name: str, value: float = 1.0) -> dict[int, Pair]:
    layers = keras_hub_layers(model)
    shapes = {i: matrix_shape(layers[i].layer) for i in numbers(model, name)}
    return {
        i: (np.ones((*shape[:-1], 2)), np.full((2, shape[-1]), value))
        for i, shape in shapes.items()
    }


def test_every_mismatch_is_told_at_once() -> None:
    model = backbone("BertBackbone")
    first, second = numbers(model, "query")
    value, _ = numbers(model, "value")
    (norm,) = numbers(model, "embeddings_layer_norm")
    pairs = {
        norm: (np.zeros((12, 2)), np.zeros((2, 4))),
        first: (np.ones((12, 3, 2)), np.ones((2, 5))),
        value: (np.ones((12, 2)), np.ones((2, 4))),
        999: (np.ones((12, 3, 2)), np.ones((2, 4))),
    }
    with pytest.raises(AdapterFileError) as caught:
        match_keras_hub_layers(model, pairs, "x.lora.h5")
    for part in (
        "Invalid 'x.lora.h5': expected factors for layers of this model",
        "lora/999, while the model has ",
        f"lora/{norm} ('embeddings_layer_norm'), a layer for which Keras has no LoRA",
        f"no lora/{second} ('",
        f"lora/{first} ('transformer_layer_0/self_attention_layer/query') of shapes (12, 3, 2) "
        "and (2, 5), expected (12, 3, 2) and (2, 4)",
        f"lora/{value} ('transformer_layer_0/self_attention_layer/value') of shapes",
        "build the backbone that the file was saved from",
    ):
        assert part in str(caught.value)


def test_a_file_of_a_smaller_model_is_refused(file: Path) -> None:
    options: dict[str, Any] = {
        "vocabulary_size": 11,
        "num_heads": 2,
        "hidden_dim": 6,
        "intermediate_dim": 5,
    }
    small, large = (keras_hub.models.GPT2Backbone(num_layers=n, **options) for n in (1, 3))
    trained(small).save_lora_weights(file)
    with pytest.raises(AdapterFileError, match="no lora/"):
        keras_hub_factors(large, file)
    trained(large).save_lora_weights(file)
    with pytest.raises(AdapterFileError, match="layers with weights"):
        keras_hub_factors(small, file)


def test_layers_that_cannot_be_adapted(file: Path) -> None:
    """KerasHub's file may have a convolution, and no embedding."""
    model = vit()
    trained(model, names=[CONVOLUTION, "query"]).save_lora_weights(file)
    with pytest.raises(AdapterFileError, match=r"cannot be adapted \(skip_unsupported"):
        keras_hub_factors(model, file)
    with pytest.warns(
        UserWarning, match=rf"x\.lora\.h5: left out lora/\d+ \('.*{CONVOLUTION}'\), which"
    ):
        factors = keras_hub_factors(model, file, skip_unsupported=True)
    assert {path.split("/")[-1] for path in factors} == {"query"}


def test_zeros_on_layers_that_cannot_be_adapted_are_left_out() -> None:
    model = vit()
    assert match_keras_hub_layers(model, fresh_pairs(model, CONVOLUTION, 0.0), "x.lora.h5") == {}


def test_keras_hub_saves_no_embedding(file: Path) -> None:
    """The reason why `write_keras_hub_lora` refuses embeddings."""
    model = backbone("GPT2Backbone")
    model.enable_lora(2, target_layer_names=["token_embedding"])
    with pytest.raises(AttributeError, match="lora_kernel_a"):
        model.save_lora_weights(file)


# --- Factors that no file can express -------------------------------------------------------


def test_all_that_cannot_be_written_is_told_at_once(file: Path) -> None:
    model = backbone("BertBackbone")
    factors = random_factors(model, ["query", "value", "key"])
    queries = [path for path in factors if path.endswith("query")]
    values = [path for path in factors if path.endswith("value")]
    factors[queries[0]] = (np.ones((12, 2)), np.ones((2, 3, 5)))
    factors[queries[1]] = (np.array(1.0), np.ones((2, 3, 5)))
    factors[values[0]][0][0] = np.nan
    factors[values[1]][1][0] = 1e39
    keys = [path for path in factors if path.endswith("key")]
    factors["nowhere"] = factors[values[0]]
    with pytest.raises(ValueError, match="Expected factors of layers of the backbone") as caught:
        write_keras_hub_lora(file, model, factors)
    for part in (
        *(f"'{key}', which it does not reach" for key in keys),
        "'nowhere', which it does not reach",
        f"'{queries[0]}' of shapes (12, 2) and (2, 3, 5), expected (12, 2) and (2, 3, 4)",
        f"'{queries[1]}' of shapes ()",
        f"'{values[0]}' of values that are not finite in float32",
        f"'{values[1]}' of values that are not finite in float32",
    ):
        assert part in str(caught.value)
    assert not file.exists()


def test_an_adapter_with_an_embedding_is_not_saved(file: Path) -> None:
    model = backbone("GPT2Backbone")
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["query", "value", "token_embedding"]))
    with pytest.raises(ValueError, match="'token_embedding' is an embedding"):
        kl.save_keras_hub_lora(model, file)
    assert not file.exists()


@pytest.mark.parametrize("names", [["token_embedding", "query"], ["patch_embedding"]])
def test_other_kinds_of_layers_are_not_written(names: list[str], file: Path) -> None:
    model = vit() if names == [CONVOLUTION] else backbone("GPT2Backbone")
    factors = random_factors(model, ["query"])
    with pytest.raises(ValueError, match="is an embedding|which it does not reach"):
        write_keras_hub_lora(file, model, factors, target_layer_names=names)
    layer = keras_hub_layers(model)[numbers(model, names[0])[0]]
    one = {layer.path: (np.ones((2, 1)), np.ones((1, 2)))}
    with pytest.raises(ValueError, match="cannot be adapted|neither writes nor reads"):
        write_keras_hub_lora(file, model, one, target_layer_names=names)


def test_a_convolution_of_the_name_is_filled_with_zeros(file: Path) -> None:
    model = vit()
    names = [CONVOLUTION, "query"]
    factors = random_factors(model, ["query"])
    rank = write_keras_hub_lora(file, model, factors, target_layer_names=names)
    assert keras_hub_factors(model, file).keys() == factors.keys()
    model.enable_lora(rank, target_layer_names=names)
    model.load_lora_weights(file)


def test_nothing_and_a_low_rank_are_refused(file: Path) -> None:
    model = backbone("BertBackbone")
    with pytest.raises(ValueError, match="Received: none"):
        write_keras_hub_lora(file, model, {})
    empty = {path: (a[:, :0], b[:0]) for path, (a, b) in random_factors(model, ["query"]).items()}
    with pytest.raises(ValueError, match=r"of shapes \(12, 0\)"):
        write_keras_hub_lora(file, model, empty)
    with pytest.raises(ValueError, match=r"rank.*expected 4 or more.*rank=3; truncate"):
        write_keras_hub_lora(file, model, random_factors(model, ["query"]), rank=3)
    with pytest.raises(ValueError, match="rank"):
        write_keras_hub_lora(file, model, random_factors(model, ["query"]), rank=0)
