"""What trains and belongs to no adapter: a head that was put on an adapted backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from support.models import data, functional, randomize_adapters

import keras_lora as kl


class Around(keras.Model):
    """A subclassed model around a backbone."""

    def __init__(self, backbone: keras.Model) -> None:
        super().__init__(name="around")
        self.backbone = backbone
        self.top = keras.layers.Dense(2, name="top")

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return self.top(self.backbone(inputs))


def functional_around(backbone: keras.Model) -> keras.Model:
    x = keras.layers.Dense(7, name="fresh")(backbone(backbone.input))
    x = keras.layers.BatchNormalization(name="statistics")(x)
    return keras.Model(backbone.input, keras.layers.Dense(2, name="top")(x))


OUTER: dict[str, Callable[[keras.Model], keras.Model]] = {
    "functional": functional_around,
    "sequential": lambda backbone: keras.Sequential(
        [backbone, keras.layers.Dense(2, name="top", use_bias=False)]
    ),
    "subclassed": Around,
}


def outer(kind: str, adapt: bool) -> keras.Model:
    keras.utils.set_random_seed(3)
    backbone = functional()
    if adapt:
        kl.apply_lora(backbone, kl.LoRAConfig(rank=2, targets=["up"]))
    keras.utils.set_random_seed(5 + adapt)
    model = OUTER[kind](backbone)
    model(data(backbone)[0])
    if adapt:
        randomize_adapters(model)
        for variable in [v for v in model.weights if "lora" not in v.path and v.trainable]:
            variable.assign(np.random.default_rng(2).normal(size=variable.shape))
    return model


@pytest.mark.parametrize("kind", OUTER)
def test_a_fresh_head_is_saved_with_the_adapter(kind: str, tmp_path: Path) -> None:
    model, loaded = outer(kind, adapt=True), outer(kind, adapt=False)
    if kind == "functional":
        model.get_layer("statistics").moving_mean.assign(np.arange(7))
    x, _ = data(model)
    before = np.array(loaded(x))
    kl.save_adapter(model, tmp_path)
    kl.load_adapter(loaded, tmp_path)
    np.testing.assert_array_equal(np.array(loaded(x)), np.array(model(x)))
    shapes = [sorted(tuple(v.shape) for v in m.trainable_variables) for m in (model, loaded)]
    assert shapes[0] == shapes[1]
    kl.unload_lora(loaded)
    np.testing.assert_array_equal(np.array(loaded(x)), before)


def test_the_directory_of_a_checkpoint_has_the_head(tmp_path: Path) -> None:
    model, loaded = outer("functional", adapt=True), outer("functional", adapt=False)
    x, _ = data(model)
    model.compile("sgd", "mse")
    model.fit(x, np.ones((len(x), 2)), verbose=0, callbacks=[kl.AdapterCheckpoint(tmp_path)])
    kl.load_adapter(loaded, tmp_path)
    np.testing.assert_array_equal(np.array(loaded(x)), np.array(model(x)))


def test_a_head_of_a_model_from_a_keras_file_is_saved(tmp_path: Path) -> None:
    keras.utils.set_random_seed(3)
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2, layers_to_save=["head"]))
    randomize_adapters(model)
    model.get_layer("head").kernel.assign(np.random.default_rng(2).normal(size=(11, 3)))
    model.save(tmp_path / "m.keras")
    kl.save_adapter(keras.saving.load_model(tmp_path / "m.keras"), tmp_path / "adapter")
    keras.utils.set_random_seed(3)
    loaded = functional()
    kl.load_adapter(loaded, tmp_path / "adapter")
    x, _ = data(model)
    np.testing.assert_array_equal(np.array(loaded(x)), np.array(model(x)))


def test_a_base_that_was_thawed_is_named(tmp_path: Path) -> None:
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2, targets=["up"]))
    model.trainable = False
    model.trainable = True
    with pytest.warns(UserWarning, match=r"6 frozen.*'norm/gamma'.*set_adapter\(model, 'default'"):
        kl.save_adapter(model, tmp_path)
    assert set(kl.read_adapter_files(tmp_path).tensors) == {"up/lora_a", "up/lora_b"}


def test_other_formats_name_the_head(tmp_path: Path) -> None:
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    )
    kl.apply_lora(backbone, kl.LoRAConfig(rank=1, targets=["query", "value"]))
    top = keras.layers.Dense(2, name="top")
    model = keras.Model(backbone.input, top(backbone(backbone.input)))
    with pytest.raises(ValueError, match=r"top/kernel.*heads=\{...\}.*backbone alone"):
        kl.save_peft_adapter(model, tmp_path / "refused")
    kl.save_peft_adapter(model, tmp_path / "named", heads={"top": "classifier"}, prefix="")
    kl.save_peft_adapter(backbone, tmp_path / "alone", prefix="")
    with pytest.warns(UserWarning, match=r"left out: \['top/kernel', 'top/bias'\].*save_adapter"):
        kl.save_keras_hub_lora(model, tmp_path / "x.lora.h5")
    kl.save_keras_hub_lora(backbone, tmp_path / "alone.lora.h5")
