"""Adapting and merging that is refused, and that a failed call changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from support.models import (
    CONFIG,
    composite,
    functional,
    randomize_adapters,
    state,
)

import keras_lora as kl
from keras_lora.layers import AdapterBank


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
    quantized.get_layer("up").quantize("float8")
    constrained = functional(kernel_constraint="non_neg")
    for model, message in [
        (enabled, "without Keras's own LoRA"),
        (quantized, "floating-point weights.*float8"),
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
    original, calls = AdapterBank.add, []

    def failing(self: AdapterBank, name: str, *args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == 4:
            raise MemoryError("no memory left")
        return original(self, name, *args, **options)

    monkeypatch.setattr(AdapterBank, "add", failing)
    with pytest.raises(MemoryError):
        kl.apply_lora(model, CONFIG)
    assert state(model) == before


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
        ({"dtype": "float8_from_float32"}, "floating-point"),
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


def test_setting_the_weights_of_the_base_alone_names_how() -> None:
    layer = kl.apply_lora(functional(), kl.LoRAConfig(rank=2)).get_layer("up")
    with pytest.raises(ValueError, match=r"layer\.assign_base\(kernel\)"):
        layer.set_weights([np.zeros((5, 7)), np.zeros(7)])
    layer.set_weights(layer.get_weights())
