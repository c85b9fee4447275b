"""The keys of files do not depend on the numbers that Keras adds to names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.adapters import factors
from support.models import randomize_adapters
from support.saved_adapters import same_base

import keras_lora as kl
from keras_lora.files.adapter_files import write_adapter_files
from keras_lora.walker import Tree
from keras_lora.walker.stable_names import stable_name

KERAS_LAYERS = sorted(n for n in dir(keras.layers) if isinstance(getattr(keras.layers, n), type))
OTHER_NAMES = [
    *("_Block", "__Block", "___", "_block", "Block_", "My_Block", "My__Block", "_My_Block_2"),
    *("HTTPBlock", "BlockHTTP", "BLOCK", "block", "aB", "ABc", "A1B2", "Block2D", "2D", "B_1"),
    *("Block<int>", "a.b.Block", "Größe", "Ünder", "块Block", "Mlp4xBlock", "GPT2_Layer"),
]


@pytest.mark.parametrize("name", [*KERAS_LAYERS, *OTHER_NAMES])
def test_a_name_that_keras_makes_from_a_class_loses_its_number(name: str) -> None:
    made = [type(name, (keras.layers.Layer,), {})() for _ in range(3)]
    (stable,) = {stable_name(layer) for layer in made}
    for layer in made:
        assert layer.name.removeprefix(stable).lstrip("_").isdigit() or layer.name == stable
    assert made[-1].name != stable


def test_a_given_name_stays() -> None:
    for name in ("dense_1x", "block_1", "1", "dense1", "dense_"):
        assert stable_name(keras.layers.Dense(2, name=name)) == name


class _Block(keras.layers.Layer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.up = keras.layers.Dense(5)

    def build(self, input_shape: Any) -> None:
        self.up.build(input_shape)

    def call(self, inputs: Any) -> Any:
        return inputs + self.up(inputs)


def blocks(*names: str) -> keras.Model:
    named = [_Block(name=name) for name in names] if names else [_Block(), _Block()]
    return keras.Sequential([keras.Input((5,)), *named, keras.layers.Dense(3, name="head")])


def recurrent() -> keras.Model:
    layers = keras.layers
    lstm = layers.Bidirectional(layers.LSTM(3, return_sequences=True))
    gru = layers.Bidirectional(layers.GRU(2), backward_layer=layers.GRU(2, go_backwards=True))
    return keras.Sequential(
        [keras.Input((7, 5)), layers.Dense(3), lstm, gru, layers.Dense(3, name="head")]
    )


@pytest.mark.parametrize(
    ("make", "kept"), [(blocks, ["head"]), (recurrent, ["re:bidirectional[^/]*"])]
)
def test_an_adapter_loads_into_a_second_model_of_the_process(
    make: Callable[[], keras.Model], kept: list[str], tmp_path: Path
) -> None:
    model = kl.apply_lora(make(), kl.LoRAConfig(rank=2, layers_to_save=kept))
    randomize_adapters(model)
    kl.save_adapter(model, tmp_path / "a")
    fresh = same_base(make, model)
    assert set(Tree.of(fresh).stable_paths.values()) == set(Tree.of(model).stable_paths.values())
    kl.load_adapter(fresh, tmp_path / "a")
    x = np.random.default_rng(1).normal(size=(3, *model.input_shape[1:])).astype("float32")
    received, expected = (m.predict(x, verbose=0) for m in (fresh, model))
    np.testing.assert_allclose(received, expected, rtol=1e-6, atol=1e-6)


def test_keys_that_version_0_1_0_wrote_of_such_classes(tmp_path: Path) -> None:
    """It took the numbers for part of the names, as they are in the first model of a process."""
    model = kl.apply_lora(blocks("__block", "__block_1"), kl.LoRAConfig(rank=2))
    randomize_adapters(model)
    kl.save_adapter(model, tmp_path / "new")
    files = kl.read_adapter_files(tmp_path / "new")
    assert "__block#2/dense/lora_a" in files.tensors
    shapes = {"bias": [5], "kernel": [5, 5]}
    keys = [[f"{b}/dense/{n}", s] for b in ("__block", "__block_1") for n, s in shapes.items()]
    keys += [["head/bias", [3]], ["head/kernel", [5, 3]]]
    fingerprint = hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()
    config = files.config | {"base": files.config["base"] | {"fingerprint": fingerprint}}
    tensors = {key.replace("__block#2", "__block_1"): x for key, x in files.tensors.items()}
    write_adapter_files(tmp_path / "old", config, tensors, overwrite=False)

    fresh = blocks("__block", "__block_1")
    kl.load_adapter(fresh, tmp_path / "old")
    ours, theirs = (list(factors(m, "default").values()) for m in (fresh, model))
    assert ours == theirs


class Task(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = blocks()
        self.scores = keras.layers.Dense(2)

    def call(self, inputs: Any) -> Any:
        return self.scores(self.backbone(inputs))


@pytest.mark.parametrize("allow", [False, True], ids=["strict", "allow_other_base"])
def test_an_adapter_of_a_part_says_where_to_load_it(allow: bool, tmp_path: Path) -> None:
    part = kl.apply_lora(blocks(), kl.LoRAConfig(rank=2))
    kl.save_adapter(part, tmp_path / "a")
    task = Task()
    task(np.zeros((1, 5), "float32"))
    with pytest.raises(kl.AdapterFileError, match=r"load_adapter\(model\.backbone, \.\.\.\)"):
        kl.load_adapter(task, tmp_path / "a", allow_other_base=allow)
    assert not kl.lora_layers(task)
    kl.load_adapter(task.backbone, tmp_path / "a")

    inputs = keras.Input((5,))
    outer = keras.Model(inputs, keras.layers.Dense(2)(blocks()(inputs)))
    with pytest.raises(kl.AdapterFileError, match=r"load_adapter\(<the model at 'sequential"):
        kl.load_adapter(outer, tmp_path / "a", allow_other_base=allow)
