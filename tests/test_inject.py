"""Adapting, merging, unloading and copying whole models; and that a failed call changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import numpy_of
from support.models import (
    CONFIG,
    Subclassed,
    composite,
    data,
    every_model,
    functional,
    names,
    randomize_adapters,
    state,
    subclassed,
)

import keras_lora as kl
from keras_lora.layers.lora_layer import LoRALayer


@every_model
def test_round_trip_of_apply_and_unload(make: Callable[[], keras.Model]) -> None:
    model = make()
    model.layers[-1].trainable = False
    before = state(model)
    kl.apply_lora(model, CONFIG)
    assert names(model.trainable_variables) == ["lora_a", "lora_b"]
    assert kl.unload_lora(model) is model
    assert state(model) == before


@every_model
def test_merged_copy_leaves_the_adapted_model_alone(make: Callable[[], keras.Model]) -> None:
    model = make()
    x, _ = data(model)
    kl.apply_lora(model, CONFIG)
    randomize_adapters(model)
    if make is subclassed:
        with pytest.raises(ValueError, match=r"get_config\(\).*Subclassed.*inplace=True"):
            kl.merge_lora(model, inplace=False)
        return
    before, expected = state(model), numpy_of(model(x))
    merged = kl.merge_lora(model, inplace=False)
    assert state(model) == before
    assert not kl.lora_layers(merged)
    assert all(v.trainable for v in merged.weights if "moving" not in v.name)
    np.testing.assert_allclose(numpy_of(merged(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [functional, composite])
def test_adapting_a_copy_leaves_the_model_alone(make: Callable[[], keras.Model]) -> None:
    model = make()
    model.compile("adam", "mse")
    x, y = data(model)
    before, expected = state(model), numpy_of(model(x))
    copy = kl.apply_lora(model, CONFIG, inplace=False)
    assert copy is not model
    assert len(kl.lora_layers(copy)) == len(kl.find_targets(model))
    np.testing.assert_allclose(numpy_of(copy(x)), expected, rtol=1e-5, atol=1e-6)
    copy.fit(x, y, verbose=0)
    assert state(model) == before


def test_a_config_that_forgets_variables_is_refused() -> None:
    @keras.saving.register_keras_serializable("tests")
    class Forgetful(keras.Model):
        def __init__(self, width: int = 5, **options: Any) -> None:
            super().__init__(**options)
            self.dense = keras.layers.Dense(width, name="dense")
            self.head = keras.layers.Dense(3, name="head")

        def call(self, inputs: Any) -> Any:
            return self.head(self.dense(inputs))

        def get_config(self) -> dict[str, Any]:
            return {"name": self.name}

    model = Forgetful(width=7)
    model(np.zeros((1, 5), "float32"))
    before = state(model)
    with pytest.raises(ValueError, match="get_config is incomplete"):
        kl.apply_lora(model, CONFIG, inplace=False)
    assert state(model) == before


def test_bias_and_layers_to_save_select_what_else_trains() -> None:
    def trained(**options: Any) -> list[str]:
        model = composite(1)
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up", "query"], **options))
        return sorted(
            f"{node}/{v.name}"
            for node in ["up", "query", "key", "norm", "head"]
            for v in _layer(model, node).trainable_variables
            if "lora" not in v.name
        )

    assert trained() == []
    assert trained(bias="lora_only") == ["query/bias", "up/bias"]
    assert trained(bias="all") == ["head/bias", "key/bias", "query/bias", "up/bias"]
    assert trained(layers_to_save=["head", "norm"]) == [
        "head/bias",
        "head/kernel",
        "norm/beta",
        "norm/gamma",
    ]


def _layer(model: keras.Model, name: str) -> keras.layers.Layer:
    return next(layer for layer in model._flatten_layers() if layer.name == name)


def test_patterns_give_layers_their_own_rank_and_alpha() -> None:
    model = kl.apply_lora(
        composite(),
        kl.LoRAConfig(
            rank=2,
            alpha=3,
            targets=["query", "up"],
            rank_pattern={"block_1/up": 4, "up": 1},
            alpha_pattern={"re:.*/query": 8},
        ),
    )
    specs = {path: layer.adapters["default"].spec for path, layer in kl.lora_layers(model).items()}
    assert {path: (spec.rank, spec.alpha) for path, spec in specs.items()} == {
        "block_0/attention/query": (2, 8),
        "block_1/attention/query": (2, 8),
        "block_0/up": (1, 3),
        "block_1/up": (4, 3),
    }


def test_a_layer_in_layers_to_save_takes_no_adapter() -> None:
    model = kl.apply_lora(composite(), kl.LoRAConfig(rank=2, layers_to_save=["block_0"]))
    assert not [path for path in kl.lora_layers(model) if path.startswith("block_0")]


def test_a_frozen_model_trains_its_adapters_and_is_frozen_again_afterwards() -> None:
    model = composite()
    model.trainable = False
    before = state(model)
    kl.apply_lora(model, CONFIG)
    assert names(model.trainable_variables) == ["lora_a", "lora_b"]
    x, y = data(model)
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    kl.unload_lora(model)
    assert state(model) == before


def test_statistics_of_a_frozen_batch_normalization_do_not_move() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    x, y = data(model)
    norm = model.get_layer("norm")
    before = [numpy_of(v) for v in norm.weights]
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    for variable, value in zip(norm.weights, before, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), value)


def test_a_shared_layer_is_adapted_once() -> None:
    shared = keras.layers.Dense(5, name="shared")
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(shared(shared(inputs))))
    x, _ = data(model)
    kl.apply_lora(model, CONFIG)
    assert list(kl.lora_layers(model)) == ["shared"]
    randomize_adapters(model)
    expected = numpy_of(model(x))
    np.testing.assert_allclose(numpy_of(kl.merge_lora(model)(x)), expected, rtol=1e-4)


def test_a_second_adapter_acts_alone_and_can_be_switched() -> None:
    model = functional()
    x, _ = data(model)
    base = numpy_of(model(x))
    kl.apply_lora(model, CONFIG, name="one")
    randomize_adapters(model)
    one = numpy_of(model(x))
    kl.apply_lora(model, kl.LoRAConfig(rank=3, targets=["middle"]), name="two")
    np.testing.assert_allclose(numpy_of(model(x)), base, rtol=1e-5, atol=1e-6)
    assert names(model.trainable_variables) == ["lora_a", "lora_b"]
    kl.set_adapter(model, "one")
    np.testing.assert_array_equal(numpy_of(model(x)), one)
    assert names(model.trainable_variables) == ["lora_a", "lora_b"]
    kl.set_adapter(model, None)
    np.testing.assert_allclose(numpy_of(model(x)), base, rtol=1e-5, atol=1e-6)
    assert not model.trainable_variables
    with pytest.raises(ValueError, match="names among"):
        kl.set_adapter(model, ["one", "three"])
    with pytest.raises(ValueError, match="all inactive"):
        kl.merge_lora(model)
    kl.set_adapter(model, "one")
    with pytest.warns(UserWarning, match=r"drops the adapters that are not active: \['two'\]"):
        kl.merge_lora(model)


def test_a_high_rank_is_allowed_with_one_warning_that_names_the_layers() -> None:
    with pytest.warns(UserWarning, match=r"above the smaller side.*\['up'\]") as caught:
        kl.apply_lora(functional(), kl.LoRAConfig(rank=6, targets=["up", "middle"]))
    assert len(caught) == 1


def refused() -> dict[str, tuple[Callable[[keras.Model], object], str]]:
    adapted: dict[str, Any] = {"targets": ["up"], "rank": 2}
    return {
        "no match": (lambda m: kl.apply_lora(m, kl.LoRAConfig(targets=["upp"])), "match none"),
        "partly": (lambda m: kl.apply_lora(m, kl.LoRAConfig(targets=["up", "x"])), r"\['x'\]"),
        "all excluded": (
            lambda m: kl.apply_lora(m, kl.LoRAConfig(exclude=["re:.*"])),
            "at least one target to remain",
        ),
        "name empty": (lambda m: kl.apply_lora(m, CONFIG, name=""), "adapter name"),
        "name slash": (lambda m: kl.apply_lora(m, CONFIG, name="a/b"), "adapter name"),
        "name dot": (lambda m: kl.apply_lora(m, CONFIG, name="a.b"), "adapter name"),
        "config": (lambda m: kl.apply_lora(m, {"rank": 2}), "LoRAConfig"),  # type: ignore[arg-type]
        "rank pattern": (
            lambda m: kl.apply_lora(m, kl.LoRAConfig(rank_pattern={"head": 2})),
            r"`rank_pattern` to match a target.*\['head'\]",
        ),
        "alpha pattern": (
            lambda m: kl.apply_lora(m, kl.LoRAConfig(alpha_pattern={"uq": 2})),
            "`alpha_pattern` to match a target",
        ),
        "save": (
            lambda m: kl.apply_lora(m, kl.LoRAConfig(layers_to_save=["heads"])),
            r"`layers_to_save`.*\['heads'\].*Closest: .*'head'",
        ),
        "both": (
            lambda m: kl.apply_lora(m, kl.LoRAConfig(**adapted, layers_to_save=["up"])),
            "in both",
        ),
        "merge": (kl.merge_lora, "has none"),
        "unload": (kl.unload_lora, "has none"),
        "summary": (kl.lora_summary, "has none"),
        "set": (lambda m: kl.set_adapter(m, "default"), "has none"),
        "disable": (lambda m: kl.disable_adapter(m).__enter__(), "has none"),
        "merged": (lambda m: kl.merged(m).__enter__(), "has none"),
    }


@pytest.mark.parametrize("what", list(refused()))
def test_a_refused_call_changes_nothing(what: str) -> None:
    model = functional()
    before = state(model)
    call, message = refused()[what]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert state(model) == before


def test_an_adapter_name_that_exists_is_refused() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    before = state(model)
    with pytest.raises(ValueError, match="name='default', which the model has on 'up'"):
        kl.apply_lora(model, CONFIG)
    assert state(model) == before


def test_merging_twice_is_refused() -> None:
    model = kl.merge_lora(kl.apply_lora(functional(), CONFIG))
    with pytest.raises(ValueError, match="merged or unloaded"):
        kl.merge_lora(model)


def test_keras_own_lora_a_constraint_and_quantized_weights_are_refused() -> None:
    enabled = functional()
    enabled.get_layer("up").enable_lora(2)
    quantized = functional()
    quantized.get_layer("up").quantize("int8")
    constrained = functional(kernel_constraint="non_neg")
    for model, message in [
        (enabled, "without Keras's own LoRA"),
        (quantized, "floating-point weights.*int8"),
        (constrained, "no kernel constraint"),
    ]:
        before = state(model)
        with pytest.raises(ValueError, match=f"Layer 'up'.*{message}"):
            kl.apply_lora(model, CONFIG)
        assert state(model) == before


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_merging_what_is_not_finite_is_refused(which: str, value: float) -> None:
    model = kl.apply_lora(functional(), CONFIG)
    randomize_adapters(model)
    variable = getattr(kl.lora_layers(model)["middle"].adapters["default"], which)
    variable.assign(np.full(variable.shape, value))
    before = state(model)
    calls: list[Callable[[Any], object]] = [kl.merge_lora, lambda m: kl.merged(m).__enter__()]
    for call in calls:
        with pytest.raises(ValueError, match=r"NaN or infinity in \['middle'\]"):
            call(model)
    assert state(model) == before


def test_a_delta_too_large_for_float16_is_refused() -> None:
    model = kl.apply_lora(functional(dtype="float16"), CONFIG)
    adapter = kl.lora_layers(model)["up"].adapters["default"]
    for variable in adapter.factors:
        variable.assign(np.full(variable.shape, 300.0))
    with pytest.raises(ValueError, match="too large for the dtype"):
        kl.merge_lora(model)


def test_a_failure_halfway_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = composite()
    before = state(model)
    original, calls = LoRALayer.add_adapter, []

    def failing(self: LoRALayer, name: str, *options: Any) -> Any:
        calls.append(name)
        if len(calls) == 4:
            raise MemoryError("no memory left")
        return original(self, name, *options)

    monkeypatch.setattr(LoRALayer, "add_adapter", failing)
    with pytest.raises(MemoryError):
        kl.apply_lora(model, CONFIG)
    assert state(model) == before


def test_subclassed_models_keep_working_through_attributes_and_lists() -> None:
    model = Subclassed()
    x = np.random.default_rng(0).normal(size=(2, 5)).astype("float32")
    model(x)
    kl.apply_lora(model, CONFIG)
    assert isinstance(model.blocks[1], kl.LoRADense)
    randomize_adapters(model)
    expected = numpy_of(model(x))
    kl.merge_lora(model)
    assert type(model.blocks[1]) is keras.layers.Dense
    np.testing.assert_allclose(numpy_of(model(x)), expected, rtol=1e-4, atol=1e-5)


def test_keras_own_lora_on_an_adapted_layer_is_refused() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    before = state(model)
    with pytest.raises(ValueError, match="Keras's own LoRA.*apply_lora"):
        model.get_layer("up").enable_lora(2)
    assert state(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1}, "dropout"),
        ({"lora_rank": 2}, "Keras's own LoRA"),
        ({"kernel_constraint": "non_neg"}, "no kernel constraint"),
        ({"dtype": "int8_from_float32"}, "floating-point"),
        ({"adapters": {"a/b": {"rank": 2, "alpha": 2}}}, "adapter name"),
        ({"adapters": {"a": {"rank": 2, "alpha": 2}}, "active": ["b"]}, "active"),
    ],
)
def test_layers_by_hand_refuse_what_apply_lora_refuses(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kl.LoRADense(3, **options)


def test_a_model_whose_constructor_failed_is_no_obstacle() -> None:
    class Broken(keras.Model):
        def __init__(self) -> None:
            kept.append(self)
            raise RuntimeError

    kept: list[Any] = []
    with pytest.raises(RuntimeError):
        Broken()
    assert kl.lora_layers(kl.apply_lora(functional(), CONFIG))
    assert kept
