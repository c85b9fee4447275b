"""Adapter files of whole models: what is in them, where they fit, and that damage is an error."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file
from support import processes
from support.adapters import CONFIGS, Counter, counted, factors, fit
from support.cases import numpy_of
from support.models import (
    composite,
    data,
    every_model,
    functional,
    randomize_adapters,
    state,
)
from support.mutations import mutations

import keras_lora as kl

CONFIG = kl.LoRAConfig(
    rank=3, alpha=5, dropout=0.1, use_rslora=True, bias="lora_only", layers_to_save=["head"]
)


def predict(model: keras.Model) -> np.ndarray:
    return numpy_of(model.predict(data(model)[0], verbose=0))


def trained(make: Callable[[], keras.Model] = functional, **options: Any) -> keras.Model:
    model = make()
    kl.apply_lora(model, options.pop("config", CONFIG), **options)
    randomize_adapters(model)
    model.compile("adam", "mse")
    fit(model)
    return model


def same_base(make: Callable[[], keras.Model], model: keras.Model) -> keras.Model:
    """A base of the same values, whose layers have other automatic names."""
    fresh = make()
    ours = {id(v) for x in kl.lora_layers(model).values() for v in x.adapter_variables}
    with kl.disable_adapter(model):
        values = [numpy_of(v) for v in model.weights if id(v) not in ours]
        fresh.set_weights(values)
    return fresh


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


def fit_and_check(model: keras.Model, name: str) -> None:
    before = {n: factors(model, n) for n in ["fr", "de"]}
    model.compile("adam", "mse")
    fit(model)
    after = {n: factors(model, n) for n in ["fr", "de"]}
    assert {n for n in after if after[n] != before[n]} == {name}


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
        ("head", "head/kernel: of one of the two only.*head/bias"),
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


def test_another_base_is_refused_or_taken_as_far_as_it_fits(tmp_path: Path) -> None:
    kl.save_adapter(kl.apply_lora(composite(2), kl.LoRAConfig(rank=2)), tmp_path)
    for other, message in [(composite(1), "base with the shapes"), (functional(), "base with")]:
        before = state(other)
        with pytest.raises(kl.AdapterFileError, match=f"{message}.*'encoder'.*allow_other_base"):
            kl.load_adapter(other, tmp_path)
        assert state(other) == before
    smaller = composite(1)
    with pytest.warns(UserWarning, match=r"left out.*block#2/attention/query.*'block#2/up'"):
        kl.load_adapter(smaller, tmp_path, allow_other_base=True)
    assert len(kl.lora_layers(smaller)) == 6
    with pytest.raises(kl.AdapterFileError, match="Received: none"):
        kl.load_adapter(functional(), tmp_path, allow_other_base=True)


def test_all_wrong_shapes_are_listed_at_once(tmp_path: Path) -> None:
    def wider(width: int) -> keras.Model:
        layers = [keras.layers.Dense(width, name=n) for n in ["up", "middle"]]
        return keras.Sequential([keras.Input((5,)), *layers, keras.layers.Dense(3, name="head")])

    kl.save_adapter(kl.apply_lora(wider(7), kl.LoRAConfig(rank=2)), tmp_path)
    model = wider(11)
    before = state(model)
    with pytest.raises(
        kl.AdapterFileError,
        match=r"middle/lora_a.*middle/lora_b.*up/lora_b: shape \(2, 7\), expected \(2, 11\)",
    ):
        kl.load_adapter(model, tmp_path, allow_other_base=True)
    assert state(model) == before


def test_arguments_are_checked_before_anything_is_touched(tmp_path: Path) -> None:
    model = trained()
    kl.save_adapter(model, tmp_path)
    before = state(model)
    cases: list[tuple[Callable[[], None], str]] = [
        (lambda: kl.save_adapter(model, tmp_path), "overwrite=True"),
        (lambda: kl.save_adapter(model, tmp_path, "x"), "names among"),
        (lambda: kl.save_adapter(model, tmp_path / "b", dtype="int8"), "dtype"),
        (lambda: kl.save_adapter(functional(), tmp_path / "b"), "has none"),
        (lambda: kl.load_adapter(model, tmp_path), "new adapter name"),
        (lambda: kl.load_adapter(model, tmp_path, "../x"), "adapter name"),
        (lambda: kl.load_adapter(model, tmp_path / "b", "b"), "path that can be used"),
        (lambda: kl.load_adapter("model", tmp_path, "b"), "built Keras model"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
        assert state(model) == before
    assert not (tmp_path / "b").exists()
    kl.lora_layers(model)["up"].adapters["default"].a.assign(np.full((5, 3), np.nan))
    with pytest.raises(kl.AdapterFileError, match="up/lora_a.*NaN"):
        kl.save_adapter(model, tmp_path / "b")
    kl.lora_layers(model)["up"].adapters["default"].a.assign(np.full((5, 3), 1e9))
    with pytest.raises(kl.AdapterFileError, match="up/lora_a.*infinity"):
        kl.save_adapter(model, tmp_path / "b", dtype="float16")


def rewrite(directory: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Valid files of other content."""
    from keras_lora.files.adapter_files import write_adapter_files  # noqa: PLC0415

    files = kl.read_adapter_files(directory)
    change(files.config, files.tensors)
    write_adapter_files(directory, files.config, files.tensors, overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: t.pop("up/lora_b"), "up/lora_b: missing"),
        (lambda c, t: t.pop("up/lora_a"), "up/lora_b: not expected"),
        (lambda c, t: t.update({"up/extra": np.zeros(3)}), "up/extra: not expected"),
        (lambda c, t: t.update({"no/lora_a": np.zeros(3)}), "no: the model has no such"),
        (lambda c, t: t.pop("head/bias"), "head/bias: missing"),
        (lambda c, t: c["spec"].update(rank=2), r"up/lora_a: shape \(5, 3\), expected \(5, 2\)"),
        (lambda c, t: c["spec"].update(rank="3"), "the spec of 'middle'.*rank"),
        (lambda c, t: c["spec"].update(other=3), "the spec of 'middle'.*other"),
        (lambda c, t: c["config"].update(rank=0), "config to be valid.*rank"),
        (lambda c, t: c.update(config=[]), "the fields of an adapter"),
        (lambda c, t: c.pop("variables"), "the fields of an adapter.*variables"),
        (lambda c, t: c.update(base=3), "the fields of an adapter.*base"),
        (lambda c, t: c["variables"].append(["x"]), "the fields of an adapter"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    kl.save_adapter(trained(), tmp_path)
    rewrite(tmp_path, change)
    model = functional()
    before = state(model)
    with pytest.raises(kl.AdapterFileError, match=message):
        kl.load_adapter(model, tmp_path)
    assert state(model) == before


def test_unknown_fields_are_ignored_with_a_warning(tmp_path: Path) -> None:
    kl.save_adapter(trained(), tmp_path)
    rewrite(tmp_path, lambda config, _: config.update(colour="red"))
    with pytest.warns(UserWarning, match=r"ignored the unknown fields \['colour'\]"):
        kl.load_adapter(functional(), tmp_path)


FUZZED: dict[str, Any] = {}


def fuzzed() -> dict[str, Any]:
    if not FUZZED:
        model = trained()
        directory = Path(tempfile.mkdtemp()) / "saved"
        kl.save_adapter(model, directory)
        FUZZED.update(directory=directory, tensors=kl.read_adapter_files(directory).tensors)
        FUZZED.update(model=functional(), size=sum(f.stat().st_size for f in directory.iterdir()))
        FUZZED.update(before=state(FUZZED["model"]))
    return FUZZED


@pytest.mark.slow
@settings(max_examples=2000, derandomize=True, deadline=None, database=None)
@given(mutate=mutations())
def test_damaged_files_load_what_was_saved_or_leave_the_model_alone(mutate: Any) -> None:
    saved = fuzzed()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "adapter"
        shutil.copytree(saved["directory"], directory)
        mutate(directory)
        model = saved["model"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*save was interrupted")
            try:
                kl.load_adapter(model, directory)
            except kl.AdapterFileError:
                assert state(model) == saved["before"]
                return
        for key, value in saved["tensors"].items():
            layer, _, name = key.rpartition("/")
            if name in {"lora_a", "lora_b"}:
                adapter = kl.lora_layers(model)[layer].adapters["default"]
                np.testing.assert_array_equal(getattr(adapter, name[-1]), value)
        kl.unload_lora(model)
        assert state(model) == saved["before"]


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
    """In a process of its own: the search for outer models lists all objects that there are."""
    processes.run(MEASURED, tmp_path)
