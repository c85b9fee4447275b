"""Adapter files of whole models: what is in them, and where they fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import processes
from support.adapters import CONFIGS, Counter, counted, factors, fit
from support.models import (
    every_model,
    functional,
    randomize_adapters,
    state,
)
from support.saved_adapters import CONFIG, fit_and_check, predict, same_base, trained

import keras_lora as kl


@every_model
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_fresh_base_with_the_file_is_the_model(make: Any, dtype: str, tmp_path: Path) -> None:
    model = trained(make)
    expected = predict(model)
    kl.save_adapter(model, tmp_path / "a", dtype=dtype)
    fresh = same_base(make, model)
    kl.load_adapter(fresh, tmp_path / "a", "other")
    tolerance = {"float32": 1e-6, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    np.testing.assert_allclose(predict(fresh), expected, rtol=tolerance, atol=tolerance)
    specs = [
        [a.spec for x in kl.lora_layers(m).values() for a in x.adapters.values()]
        for m in (model, fresh)
    ]
    assert specs[0] == specs[1]
    names = [[v.name for v in m.trainable_variables] for m in (model, fresh)]
    assert names[0] == names[1]
    fresh.compile("adam", "mse")
    fit(fresh)
    kl.save_adapter(fresh, tmp_path / "a", "other", overwrite=True)
    kl.load_adapter(same_base(make, model), tmp_path / "a")


@every_model
def test_the_file_holds_what_was_trained_and_nothing_else(make: Any, tmp_path: Path) -> None:
    model = trained(make)
    kl.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    values = sorted(np.array(v).tobytes() for v in model.trainable_variables)
    assert sorted(x.tobytes() for x in tensors.values()) == values
    assert {x.dtype.name for x in tensors.values()} == {"float32"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert kl.LoRAConfig.from_dict(config["config"]) == CONFIG
    assert config["keras_version"] == keras.__version__
    assert config["base"]["name"] == model.name
    size = (tmp_path / "adapter.safetensors").stat().st_size
    assert size <= 1.02 * 4 * sum(x.size for x in tensors.values()) + 4096 + 150 * len(tensors)


def test_paths_do_not_depend_on_the_numbers_of_keras(tmp_path: Path) -> None:
    def make() -> keras.Model:
        inputs = keras.Input((5,))
        x = keras.layers.Dense(7)(keras.layers.Dense(5)(inputs))
        return keras.Model(inputs, keras.layers.Dense(3)(x))

    model = make()
    kl.apply_lora(model, kl.LoRAConfig(rank=2))
    kl.save_adapter(model, tmp_path)
    keys = set(load_file(tmp_path / "adapter.safetensors"))
    assert keys == {f"{layer}/lora_{ab}" for layer in ["dense", "dense#2"] for ab in "ab"}
    kl.load_adapter(make(), tmp_path)


def test_each_adapter_is_saved_alone_with_its_own_head(tmp_path: Path) -> None:
    model = functional()
    outputs = {}
    for name in ["one", "two"]:
        kl.apply_lora(model, CONFIG, name=name)
        randomize_adapters(model)
        model.compile("adam", "mse")
        fit(model)
        outputs[name] = predict(model)
    kl.set_adapter(model, None)
    for name in ["one", "two"]:
        kl.save_adapter(model, tmp_path / name, name)
        fresh = same_base(functional, model)
        kl.load_adapter(fresh, tmp_path / name)
        kl.set_adapter(model, name)
        np.testing.assert_allclose(predict(fresh), predict(model), rtol=1e-5, atol=1e-6)
        kl.set_adapter(model, None)


def test_loading_changes_nothing_for_the_others(tmp_path: Path) -> None:
    kl.save_adapter(trained(config=CONFIGS["de"], name="de"), tmp_path, "de")
    model = kl.apply_lora(functional(), CONFIGS["fr"], name="fr")
    flags = [(v.path, v.trainable) for v in model.variables]
    before = factors(model, "fr"), predict(model)
    kl.load_adapter(model, tmp_path, "de")
    assert [(v.path, v.trainable) for v in model.variables] == flags
    assert factors(model, "fr") == before[0]
    np.testing.assert_array_equal(predict(model), before[1])
    kl.set_adapter(model, "de")
    fit_and_check(model, "de")


def test_a_running_service_changes_its_task_without_a_trace(tmp_path: Path) -> None:
    expected = {}
    for name, rank, alpha, targets in [
        ("news", 3, 5.0, ["up", "middle"]),
        ("film", 2, 7.0, ["up"]),
        ("talk", 1, 1.0, ["middle"]),
    ]:
        keras.utils.set_random_seed(4)
        model = counted()[0]
        kl.apply_lora(model, kl.LoRAConfig(rank=rank, alpha=alpha, targets=targets))
        randomize_adapters(model, scale=rank)
        expected[name] = predict(model)
        kl.save_adapter(model, tmp_path / name)
    keras.utils.set_random_seed(4)
    service, counter = counted()
    assert isinstance(counter, Counter)
    kl.load_adapter(service, tmp_path / "news", "live")
    predict(service)
    traced = counter.calls
    for name in ["film", "talk", "news", "film"]:
        kl.load_adapter(service, tmp_path / name, "live", replace=True)
        np.testing.assert_allclose(predict(service), expected[name], rtol=1e-5, atol=1e-6)
    if keras.backend.backend() != "torch":
        assert counter.calls == traced


def test_what_does_not_fit_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    for name, config in {
        "wide": kl.LoRAConfig(rank=4, targets=["up"]),
        "other": kl.LoRAConfig(rank=1, targets=["middle"]),
        "head": kl.LoRAConfig(rank=1, targets=["up"], layers_to_save=["head"]),
    }.items():
        kl.save_adapter(kl.apply_lora(functional(), config), tmp_path / name)
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2, targets=["up"]))
    before = state(model)
    for name, message in [
        ("wide", r"up: rank 4 among slots of rank \[2\]"),
        ("other", "middle: not adapted"),
        ("head", "head/kernel: owned by one of the two adapters only.*head/bias"),
    ]:
        with pytest.raises(kl.AdapterFileError, match=f"{message}.*delete_adapter"):
            kl.load_adapter(model, tmp_path / name, replace=True)
        assert state(model) == before
    with pytest.raises(ValueError, match="names among"):
        kl.load_adapter(model, tmp_path / "wide", "new", replace=True)


def test_dropout_that_was_not_compiled_is_left_out_with_a_warning(tmp_path: Path) -> None:
    kl.save_adapter(kl.apply_lora(functional(), kl.LoRAConfig(rank=2, dropout=0.5)), tmp_path)
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2))
    with pytest.warns(UserWarning, match="its dropout is left out"):
        kl.load_adapter(model, tmp_path, replace=True)
    assert kl.lora_layers(model)["up"].adapters["default"].spec.dropout == 0


def test_a_replaced_adapter_trains_with_a_fresh_optimizer(tmp_path: Path) -> None:
    model = trained(config=CONFIGS["it"])
    kl.save_adapter(model, tmp_path)
    fit(model)
    kl.load_adapter(model, tmp_path, replace=True)
    assert int(model.optimizer.iterations) == 0
    fit(model)
    fresh = same_base(functional, model)
    kl.load_adapter(fresh, tmp_path)
    fresh.compile("adam", "mse")
    fit(fresh)
    assert factors(fresh, "default") == factors(model, "default")


MEASURED = """
import sys, tracemalloc
from pathlib import Path
import keras
import keras_lora as kl

def make():
    layers = [keras.layers.Dense(503, name=f"layer_{i}") for i in range(12)]
    return keras.Sequential([keras.Input((503,)), *layers])

kl.save_adapter(kl.apply_lora(make(), kl.LoRAConfig(rank=101)), sys.argv[1])
model = make()
tracemalloc.start()
kl.load_adapter(model, sys.argv[1])
_, peak = tracemalloc.get_traced_memory()
size = Path(sys.argv[1], "adapter.safetensors").stat().st_size
assert peak < 3 * size, (peak, size)
"""


@pytest.mark.slow
def test_loading_reads_the_adapter_and_no_more(tmp_path: Path) -> None:
    """In a process of its own, since the search for outer models lists all living objects."""
    processes.run(MEASURED, tmp_path)
