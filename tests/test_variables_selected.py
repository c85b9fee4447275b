"""Which bare variables targets select, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from support.banks import banks, randomize
from support.cases import numpy_of
from support.variables import DIM, HELD, RANK, STEPS, adapted, inputs, made

import keras_lora as kl


def selected(model: keras.Model, targets: Any) -> list[str]:
    return [target.path for target in kl.find_targets(model, targets)]


def test_presets_and_names_select_matrices() -> None:
    mixture = made("mixtral")
    mixture.add(keras.layers.Dense(3, name="rows"))
    mixture.add(keras.layers.Dense(2, name="head"))
    bank = "mixture/experts/expert_feedforward_"
    every = [f"{bank}{n}_dense" for n in ("gate", "intermediate", "output")]
    assert selected(mixture, "experts") == selected(mixture, ["experts"]) == every
    assert selected(mixture, "all") == [*every, "rows"]
    assert selected(mixture, "all-linear") == ["rows"]
    assert selected(mixture, lambda target: True) == [*every, "rows", "head"]
    assert selected(mixture, [f"{bank}gate_dense", "head"]) == [every[0], "head"]
    model = made("own")
    model.add(keras.layers.Dense(3, name="rows"))
    model.add(keras.layers.Dense(2, name="head"))
    assert selected(model, "all") == selected(model, "re:.*")[:2] == ["own/inner", "rows"]
    assert selected(model, "re:.*") == ["own/inner", "rows", "head"]
    assert selected(model, ["rows"]) == ["rows"]
    assert selected(model, ["own/rows", "rows"]) == ["own/rows", "rows"]
    assert selected(model, "re:own/(rows|stack)") == ["own/rows", "own/stack"]
    with pytest.raises(ValueError, match=r"name them: targets=\['own/rows', 'own/stack', 'own/wi"):
        kl.find_targets(model, ["own"])
    (target,) = kl.find_targets(model, ["stack"])
    assert (target.kind, target.kernel_shape, target.matrix) == ("Own", (3, 5, 11), "stack")


class Peculiar(keras.layers.Layer):
    """A layer with a table, and what a test says of it."""

    def __init__(self, read: Callable[[Any], Any], **attributes: Any) -> None:
        super().__init__(name="own")
        self.read, self.options = read, attributes.pop("options", {})
        for name, value in attributes.items():
            setattr(self, name, value)

    def build(self, input_shape: Any) -> None:
        shape = self.options.pop("shape", (STEPS, input_shape[-1]))
        self.table = self.add_weight(shape=shape, name="table", **self.options)
        self.built_from = self.table * 1
        self.built = True

    def call(self, inputs: Any) -> Any:
        return inputs + self.read(self)


def peculiar(read: Callable[[Any], Any], **attributes: Any) -> keras.Model:
    layer = Peculiar(read, **attributes)
    return keras.Sequential([keras.Input((STEPS, DIM)), layer])


CONFIG = kl.LoRAConfig(rank=RANK, targets=["own/table"])


def assigned(layer: Any) -> Any:
    layer.table.assign(layer.table * 2)
    return layer.table


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (
            lambda: peculiar(lambda x: x.table, options={"constraint": "non_neg"}),
            CONFIG,
            "own/table.*expected no constraint.*exclude",
        ),
        (lambda: peculiar(lambda x: x.table, slots=3), CONFIG, r"\['slots'\].*rename"),
        (lambda: peculiar(assigned), CONFIG, "which assign to .*own/table"),
        (
            lambda: peculiar(lambda x: x.table, options={"shape": (1, DIM)}),
            CONFIG,
            r"1 by 5 as a matrix.*layers_to_save=\['own'\]",
        ),
        (
            lambda: made("own"),
            kl.LoRAConfig(rank=RANK, targets=["stack"], use_dora=True),
            r"use_dora.*\['own/stack'\], whose layers have no magnitude",
        ),
        (
            lambda: peculiar(lambda x: x.table, options={"dtype": "int32", "trainable": False}),
            CONFIG,
            "match a layer",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    make: Callable[[], keras.Model], config: kl.LoRAConfig, message: str
) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        kl.apply_lora(model, config)
    assert kl.lora_layers(model) == {}


def test_a_dense_layer_with_code_of_its_own_is_adapted_by_its_variables() -> None:
    model = made("gated")
    assert selected(model, "re:gated/.*") == ["gated/kernel", "gated/gate"]
    named = r"overrides .*or name its variables: targets=\['gated/kernel', 'gated/gate'\]"
    with pytest.raises(ValueError, match=named):
        kl.find_targets(model, ["gated"])


def test_items_of_an_attribute_go_by_their_places() -> None:
    assert selected(made("held"), "re:held/.*") == HELD


def test_a_variable_in_two_attributes_is_refused() -> None:
    model = peculiar(lambda x: x.table)
    model.layers[0].other = model.layers[0].table
    with pytest.raises(ValueError, match=r"one attribute .*\['table', 'other'\]"):
        kl.apply_lora(model, CONFIG)


@pytest.mark.parametrize("read", [lambda x: x.weights[0], lambda x: x.built_from])
def test_a_variable_that_no_code_reads_as_an_attribute_is_named(read: Any) -> None:
    model = peculiar(read)
    with pytest.warns(UserWarning, match="own/table.*no effect.*self.table"):
        kl.apply_lora(model, CONFIG)


class Parent(keras.layers.Layer):
    """A layer that reads the table of a layer in it, which is never called."""

    def __init__(self) -> None:
        super().__init__(name="parent")
        self.inner = Peculiar(lambda x: x.table)

    def build(self, input_shape: Any) -> None:
        self.inner.build(input_shape)
        self.built = True

    def call(self, inputs: Any) -> Any:
        return inputs @ ops.transpose(self.inner.table)


def test_another_layer_reads_the_effective_matrix() -> None:
    model, x = keras.Sequential([keras.Input((STEPS, DIM)), Parent()]), inputs()
    kl.apply_lora(model, CONFIG)
    randomize(model)
    (bank,) = banks(model)
    a, b = (numpy_of(f) for f in bank.adapters["default"].factors)
    w = numpy_of(bank.site.matrix) + CONFIG.spec().scaling * a @ b
    np.testing.assert_allclose(numpy_of(model(x)), x @ w.T, rtol=1e-4, atol=1e-4)


def test_adapters_of_other_forms_are_refused(tmp_path: Path) -> None:
    model = adapted("own")
    with pytest.raises(ValueError, match="own"):
        kl.save_peft_adapter(model, tmp_path / "peft")
    if keras.backend.backend() == "tensorflow":
        with pytest.raises(ValueError, match="own"):
            kl.export_saved_model(model, tmp_path / "many", adapters=["default"])
    assert not [*tmp_path.iterdir()]
