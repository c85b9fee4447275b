"""The command line called in this process, on small files of every kind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

import keras_lora as kl
import keras_lora_cli
from support.models import functional

BASE = "the base.keras"
REVIEWS = "adapters/réviews"
HEAD = ["--head", "logits=classifier"]

Run = Callable[..., "Result"]
Ask = Callable[..., Any]


class Result:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def language_model() -> keras.Model:
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=31, num_layers=1, num_heads=3, hidden_dim=24, intermediate_dim=37
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def classifier() -> keras.Model:
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=31, num_layers=1, num_heads=3, hidden_dim=15, intermediate_dim=17
    )
    return keras_hub.models.BertTextClassifier(backbone, num_classes=5, preprocessor=None)


def save_adapter(model: keras.Model, config: kl.LoRAConfig, name: str) -> None:
    """Adapt a model, save the adapter and leave the model as it was."""
    kl.apply_lora(model, config)
    rng = np.random.default_rng(len(name))
    for variable in model.trainable_variables:
        variable.assign(rng.normal(scale=0.3, size=variable.shape))
    kl.save_adapter(model, f"adapters/{name}")
    if name == "gpt2":
        kl.save_peft_adapter(model, "peft/gpt2", prefix="transformer.")
        kl.save_keras_hub_lora(model, "gpt2.lora.h5")
    if name == "bert":
        kl.save_peft_adapter(model, "peft/bert", heads={"logits": "classifier"})
    kl.unload_lora(model)


def unservable() -> tf.Module:
    module = tf.Module()
    module.f = tf.function(
        lambda x: tf.numpy_function(np.sin, [x], tf.float32),
        input_signature=[tf.TensorSpec([3], tf.float32)],
    )
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of models and adapters, with names that need quoting."""
    folder = tmp_path_factory.mktemp("with space")
    before = Path.cwd()
    os.chdir(folder)
    try:
        model = functional()
        model.save(BASE)
        save_adapter(model, kl.LoRAConfig(rank=2, alpha=3, layers_to_save=["head"]), "réviews")
        save_adapter(model, kl.LoRAConfig(rank=3, targets=["up"], use_rslora=True), "style")
        for name, task in (("gpt2", language_model()), ("bert", classifier())):
            task.save_to_preset(f"presets/{name}")
            head = ["logits"] if name == "bert" else []
            targets = ["query", "value"]
            save_adapter(task, kl.LoRAConfig(rank=2, targets=targets, layers_to_save=head), name)
        task.save("bert.keras")
        tf.saved_model.save(unservable(), "unservable")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(files)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = keras_lora_cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def ask(run: Run) -> Ask:
    """A function that runs a command with `--json`, and returns its answer."""

    def call(*arguments: object, code: int = 0) -> Any:
        result = run(*arguments, "--json")
        assert (result.err, result.code) == ("", code)
        return json.loads(result.out)

    return call


def tensors(directory: str | Path) -> Mapping[str, np.ndarray]:
    return kl.read_adapter_files(directory).tensors


def assert_same_tensors(first: str | Path, second: str | Path) -> None:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, two[key], strict=True)
