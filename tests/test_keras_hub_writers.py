"""KerasHub's own exporters write what an adapted model computes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.keras_hub_backbones import BACKBONES
from support.models import randomize_adapters, state

import keras_lora as kl

EXPORT = "export_to_transformers"
# The writers of KerasHub's models that are no writers of Keras, each with what it does.
WRITERS = {
    EXPORT: "the merged model: below",
    "save_to_preset": "refused: below",
    "save_lora_weights": "refused by KerasHub, whose own adapters the model does not have",
    "save_task_weights": "as save_weights, without the backbone",
}


def test_every_writer_of_keras_hub_is_known() -> None:
    models = [
        cls
        for _, cls in inspect.getmembers(keras_hub.models, inspect.isclass)
        if issubclass(cls, keras.Model)
    ]
    words = ("save", "export", "to_", "write", "upload")
    found = {name for cls in models for name in dir(cls) if name.startswith(words)}
    assert found - set(dir(keras.Model)) == set(WRITERS)
    owners = {cls.__name__ for cls in models if EXPORT in vars(cls)}
    assert owners == {"Backbone", "CausalLM"}


@pytest.mark.parametrize("name", ["GPT2", "Gemma", "Qwen"])
def test_the_merged_model_is_exported(name: str, tmp_path: Path) -> None:
    backbone = BACKBONES[f"{name}Backbone"]()[0]
    kl.apply_lora(backbone, kl.LoRAConfig(rank=2, use_dora=True))
    randomize_adapters(backbone)
    task = getattr(keras_hub.models, f"{name}CausalLM")(backbone, preprocessor=None)
    before = state(backbone)
    backbone.export_to_transformers(tmp_path / "backbone")
    task.export_to_transformers(tmp_path / "task")
    assert state(backbone) == before
    with kl.disable_adapter(backbone):
        backbone.export_to_transformers(tmp_path / "base")
    kl.merge_lora(backbone)
    backbone.export_to_transformers(tmp_path / "merged")
    task.export_to_transformers(tmp_path / "merged task")
    for written, merged in (("backbone", "merged"), ("task", "merged task")):
        assert exported(tmp_path / written) == exported(tmp_path / merged)
    assert exported(tmp_path / "base") != exported(tmp_path / "merged")


def exported(folder: Path) -> dict[str, Any]:
    arrays = load_file(folder / "model.safetensors")
    return {name: (array.shape, np.array(array).tobytes()) for name, array in arrays.items()}


def test_a_preset_is_refused_for_whatever_is_made_around_adapted_layers(tmp_path: Path) -> None:
    backbone = BACKBONES["GPT2Backbone"]()[0]
    kl.apply_lora(backbone, kl.LoRAConfig(rank=2))
    task = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    for model in (backbone, task):
        with pytest.raises(ValueError, match=r"merge_lora\(model, inplace=False\)"):
            model.save_to_preset(str(tmp_path / "preset"))
    assert not list(tmp_path.iterdir())
    kl.merge_lora(backbone)
    task.save_to_preset(str(tmp_path / "preset"))
    assert (tmp_path / "preset" / "config.json").exists()
