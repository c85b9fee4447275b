"""Several adapters on one model: each has its own head and biases."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from support.adapters import heads
from support.cases import numpy_of
from support.models import data, functional, state

import keras_lora as kl


def test_each_adapter_has_its_own_head_and_biases() -> None:
    keras.utils.set_random_seed(2)
    base = functional()
    x, _ = data(base)
    keras.utils.set_random_seed(2)
    model = heads()
    outputs = {}
    for name in ["one", "two", None]:
        kl.set_adapter(model, name)
        outputs[name] = numpy_of(model.predict(x, verbose=0))
        if name:
            fit_and_back(model, name)
    np.testing.assert_allclose(outputs[None], numpy_of(base.predict(x, verbose=0)), atol=1e-5)
    assert np.abs(outputs["one"] - outputs["two"]).max() > 1e-3
    for name, expected in outputs.items():
        kl.set_adapter(model, name)
        np.testing.assert_array_equal(numpy_of(model.predict(x, verbose=0)), expected)
    with pytest.raises(ValueError, match=r"'one', 'two'.*Activate one"):
        kl.set_adapter(model, ["one", "two"])
    kl.set_adapter(model, "one")
    with kl.disable_adapter(model):
        np.testing.assert_array_equal(numpy_of(model.predict(x, verbose=0)), outputs[None])
    kl.unload_lora(model)
    for variable, value in zip(model.weights, base.weights, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), numpy_of(value))


def fit_and_back(model: keras.Model, name: str) -> None:
    """Switch the adapters off and on again, which must change nothing."""
    before = [numpy_of(v) for v in model.weights]
    with kl.disable_adapter(model):
        pass
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), value)
    assert all(name in layer.active_adapters for layer in kl.lora_layers(model).values())


def test_weights_files_hold_every_adapters_head(tmp_path: Any) -> None:
    keras.utils.set_random_seed(2)
    model = heads()
    model.save_weights(tmp_path / "m.weights.h5")
    other = heads()
    other.load_weights(tmp_path / "m.weights.h5")
    x, _ = data(model)
    for name in ["one", "two", None]:
        for m in (model, other):
            kl.set_adapter(m, name)
        expected = numpy_of(model.predict(x, verbose=0))
        np.testing.assert_array_equal(numpy_of(other.predict(x, verbose=0)), expected)
    with pytest.raises(ValueError, match="no `.keras` file"):
        model.save(tmp_path / "m.keras")


def test_merging_keeps_the_head_of_what_acts() -> None:
    model = heads()
    x, _ = data(model)
    kl.set_adapter(model, "one")
    expected = numpy_of(model.predict(x, verbose=0))
    merged = kl.merge_lora(model, inplace=False)
    np.testing.assert_allclose(numpy_of(merged.predict(x, verbose=0)), expected, rtol=1e-4)
    with pytest.warns(UserWarning, match=r"\['two'\]"):
        kl.merge_lora(model)
    np.testing.assert_allclose(numpy_of(model.predict(x, verbose=0)), expected, rtol=1e-4)
    assert not [v for v in model.variables if "_lora_held" in vars(v)]


def test_a_layer_that_one_adapter_trains_in_full_no_other_adapts() -> None:
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2, layers_to_save=["middle"]))
    before = state(model)
    with pytest.raises(ValueError, match=r"\['middle'\].*the other way"):
        kl.apply_lora(model, kl.LoRAConfig(rank=2), name="two")
    with pytest.raises(ValueError, match=r"\['up'\].*the other way"):
        kl.apply_lora(
            model, kl.LoRAConfig(rank=2, targets=["head"], layers_to_save=["up"]), name="two"
        )
    assert state(model) == before


def test_a_head_goes_along_from_one_adapter_only() -> None:
    model = heads()
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"]), name="style")
    kl.combine_adapters(model, {"one": 1.0, "style": 0.5}, "new")
    kl.set_adapter(model, "one")
    head = numpy_of(model.get_layer("head").kernel)
    kl.set_adapter(model, "new")
    np.testing.assert_array_equal(numpy_of(model.get_layer("head").kernel), head)
    assert any("head" in v.path for v in model.trainable_variables)
    with pytest.raises(ValueError, match=r"heads cannot be combined"):
        kl.combine_adapters(model, {"one": 1.0, "two": 0.5}, "newer")
