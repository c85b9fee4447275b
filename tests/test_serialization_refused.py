"""Adapter files that do not fit, contradict themselves, or are damaged."""

from __future__ import annotations

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
from support.models import (
    composite,
    functional,
    state,
)
from support.mutations import mutations
from support.saved_adapters import trained

import keras_lora as kl


def test_another_base_is_refused_or_taken_as_far_as_it_fits(tmp_path: Path) -> None:
    kl.save_adapter(kl.apply_lora(composite(2), kl.LoRAConfig(rank=2)), tmp_path)
    for other, message in [
        (composite(1), "base whose layers have the names and shapes"),
        (functional(), "base whose"),
    ]:
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
        (lambda: kl.load_adapter("model", tmp_path, "b"), "expected a Keras model"),
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
