"""Several adapters on one model: which are active and train, and switching traces nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.adapters import (
    CONFIGS,
    assert_acts,
    base_variables,
    counted,
    factors,
    fit,
    with_adapters,
)
from support.cases import numpy_of
from support.models import composite, data, functional, randomize_adapters, state

import keras_lora as kl


@pytest.mark.parametrize(
    "names", [["fr"], ["de"], ["it"], ["fr", "de"], ["it", "fr", "de"], None, []]
)
def test_exactly_the_named_adapters_act(names: list[str] | None) -> None:
    model = with_adapters(functional())
    kl.set_adapter(model, names)
    assert_acts(model, dict.fromkeys(names or [], 1.0))
    active = {n for layer in kl.lora_layers(model).values() for n in layer.active_adapters}
    assert active == set(names or [])


def test_switching_traces_nothing() -> None:
    model, counter = counted()
    with_adapters(model)
    model.compile("adam", "mse")
    x, _ = data(model)
    model.predict(x, verbose=0)
    fit(model)
    model.evaluate(*data(model), verbose=0)
    traced = counter.calls
    for name in ["fr", "de", "it", "fr"]:
        kl.set_adapter(model, name)
        model.predict(x, verbose=0)
        fit(model)
        model.evaluate(*data(model), verbose=0)
        with kl.disable_adapter(model):
            model.predict(x, verbose=0)
        with kl.scale_adapter(model, name, 0.5):
            model.predict(x, verbose=0)
    if keras.backend.backend() == "torch":  # torch runs the layer's Python in each step
        return
    assert counter.calls == traced
    for name in CONFIGS:
        kl.set_adapter(model, name)
        # The compiled functions follow the switch, although nothing else runs between.
        assert_acts(model, {name: 1.0})
    assert counter.calls == traced
    kl.set_adapter(model, ["fr", "de"])  # more active adapters than before need a new slot
    model.predict(x, verbose=0)
    assert counter.calls > traced
    traced = counter.calls
    kl.set_adapter(model, ["it", "de"])
    model.predict(x, verbose=0)
    kl.set_adapter(model, "it")
    model.predict(x, verbose=0)
    assert counter.calls == traced


def test_a_further_adapter_that_fits_traces_nothing(tmp_path: Path) -> None:
    model, counter = counted()
    kl.apply_lora(model, kl.LoRAConfig(rank=3, dropout=0.2), name="fr")
    randomize_adapters(model)
    kl.save_adapter(model, tmp_path / "fr", "fr")
    model.compile("adam", "mse")
    x, _ = data(model)
    expected = model.predict(x, verbose=0)
    fit(model)
    traced = counter.calls
    kl.load_adapter(model, tmp_path / "fr", "again")
    kl.combine_adapters(model, {"again": 0.5}, "half")
    kl.apply_lora(model, kl.LoRAConfig(rank=2, dropout=0.1), name="it")
    fit(model)
    kl.set_adapter(model, "again")
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)
    if keras.backend.backend() != "torch":  # torch runs the layer's Python in each step
        assert counter.calls == traced
        kl.apply_lora(model, kl.LoRAConfig(rank=5), name="wider")
        model.predict(x, verbose=0)
        assert counter.calls > traced


def test_training_moves_the_active_adapter_only() -> None:
    model = with_adapters(functional())
    # Weight decay changes all variables of the optimizer, even without a gradient.
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), "mse")
    fit(model)
    for name in ["fr", "de", "it"]:
        kl.set_adapter(model, name)
        before = {n: factors(model, n) for n in CONFIGS}
        base = [numpy_of(v) for v in base_variables(model)]
        fit(model)
        after = {n: factors(model, n) for n in CONFIGS}
        for other in CONFIGS:
            for path, values in after[other].items():
                same = [new == old for new, old in zip(values, before[other][path], strict=True)]
                assert same == [other != name] * 2, (name, other, path)
        for variable, value in zip(base_variables(model), base, strict=True):
            np.testing.assert_array_equal(numpy_of(variable), value)


@pytest.mark.parametrize(
    "optimizer", [lambda: keras.optimizers.AdamW(0.01), lambda: keras.optimizers.Nadam(0.01)]
)
def test_training_in_turns_is_training_without_a_break(optimizer: Any) -> None:
    def make() -> keras.Model:
        keras.utils.set_random_seed(1)
        model = functional()
        for name in ["de", "it"]:
            kl.apply_lora(model, CONFIGS[name], name=name)
        model.compile(optimizer(), "mse")
        return model

    turns, unbroken = make(), make()
    for name in ["de", "it", "de"]:
        kl.set_adapter(turns, name)
        fit(turns, 2)
    kl.set_adapter(unbroken, "de")
    fit(unbroken, 4)
    assert factors(turns, "de") == factors(unbroken, "de")
    kl.set_adapter(unbroken, "it")
    fit(unbroken, 2)
    assert factors(turns, "it") == factors(unbroken, "it")


def test_not_trainable_means_that_nothing_trains() -> None:
    model = with_adapters(functional())
    kl.set_adapter(model, "fr", trainable=False)
    assert not model.trainable_variables
    assert_acts(model, {"fr": 1.0})
    kl.set_adapter(model, "fr")
    assert {v.name for v in model.trainable_variables} == {"lora_a", "lora_b"}


def test_a_summary_counts_what_trains_and_not_its_slot() -> None:
    model = with_adapters(functional(), ["fr", "de"])
    summary = kl.lora_summary(model)
    assert summary.trained.parameters == 2 * (5 + 7)
    assert [(row.adapter, row.rank, row.active) for row in summary.rows] == [
        ("fr", 3, False),
        ("de", 2, True),
        ("fr", 3, False),
    ]


@pytest.mark.parametrize("active", ["fr", "de", None])
def test_deleting_an_adapter_leaves_the_others(active: str | None) -> None:
    model = with_adapters(functional())
    kl.set_adapter(model, active)
    kept = {n: factors(model, n) for n in ["fr", "it"]}
    kl.delete_adapter(model, "de")
    assert {n for layer in kl.lora_layers(model).values() for n in layer.adapters} == {"fr", "it"}
    assert {n: factors(model, n) for n in ["fr", "it"]} == kept
    assert_acts(model, {"fr": 1.0} if active == "fr" else {})
    kl.delete_adapter(model, "fr")
    with pytest.raises(ValueError, match=r"names among \['it'\]"):
        kl.delete_adapter(model, "fr")


def test_deleting_the_last_adapter_is_unloading() -> None:
    model = composite()
    before = state(model)
    kl.apply_lora(model, kl.LoRAConfig(rank=2), name="one")
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["query"]), name="two")
    kl.delete_adapter(model, "one")
    assert {path.split("/")[-1] for path in kl.lora_layers(model)} == {"query"}
    kl.delete_adapter(model, "two")
    assert state(model) == before


def test_a_deleted_name_starts_anew() -> None:
    model = kl.apply_lora(functional(), CONFIGS["de"], name="de")
    kl.apply_lora(model, CONFIGS["it"], name="it")
    model.compile("adam", "mse")
    for name in ["de", "it"]:
        kl.set_adapter(model, name)
        fit(model)
    kl.delete_adapter(model, "de")
    kl.apply_lora(model, CONFIGS["de"], name="de")
    assert int(model.optimizer.iterations) == 0
    assert not any(np.array(kl.lora_layers(model)["up"].adapters["de"].b).any() for _ in [0])


def test_scaling_is_a_setting_and_a_context() -> None:
    model = with_adapters(functional(), ["fr", "de"])
    kl.set_adapter(model, ["fr", "de"])
    kl.scale_adapter(model, "fr", -0.5)
    assert_acts(model, {"fr": -0.5, "de": 1.0})
    with kl.scale_adapter(model, "de", 3), kl.scale_adapter(model, "fr", 0):
        assert_acts(model, {"fr": 0.0, "de": 3.0})
    assert_acts(model, {"fr": -0.5, "de": 1.0})
    kl.set_adapter(model, "de")
    kl.set_adapter(model, "fr")  # the factor stays
    assert_acts(model, {"fr": -0.5})
    for factor in [np.nan, np.inf, "2", True]:
        with pytest.raises(ValueError, match="Invalid `factor`: expected a finite number"):
            kl.scale_adapter(model, "fr", factor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names among"):
        kl.scale_adapter(model, "es", 1.0)
    expected = numpy_of(model.predict(data(model)[0], verbose=0))
    with pytest.warns(UserWarning, match="drops"):
        kl.merge_lora(model)
    np.testing.assert_allclose(numpy_of(model.predict(data(model)[0], verbose=0)), expected, 1e-4)


def test_a_name_twice_is_refused() -> None:
    model = with_adapters(functional())
    with pytest.raises(ValueError, match="each name once"):
        kl.set_adapter(model, ["fr", "fr"])


def test_the_order_of_adapters_is_kept_where_the_first_layer_lacks_the_first() -> None:
    """Otherwise two adapters would exchange their optimizer states."""

    def trained(look_elsewhere: bool) -> keras.Model:
        keras.utils.set_random_seed(0)
        model = functional()
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["middle"]), name="x")
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up", "middle"]), name="y")
        model.compile("adam", "mse")
        kl.set_adapter(model, ["x", "y"])
        fit(model)
        if look_elsewhere:
            with kl.disable_adapter(model):
                pass
            kl.set_adapter(model, "y")
            kl.set_adapter(model, ["x", "y"])
        fit(model)
        return model

    model, expected = trained(True), trained(False)
    for path, layer in kl.lora_layers(model).items():
        for name, adapter in layer.adapters.items():
            np.testing.assert_array_equal(
                adapter.b, kl.lora_layers(expected)[path].adapters[name].b
            )
