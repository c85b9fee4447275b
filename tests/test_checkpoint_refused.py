"""`AdapterCheckpoint`: a state of another run, a damaged one, and wrong arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest
from support.broken_runs import BreakAfter, BrokenError, Counter, adapted, fit, trained
from support.models import functional, state

import keras_lora as kl


def refusals() -> list[Any]:
    def other_config(model: keras.Model) -> keras.Model:
        kl.unload_lora(model)
        kl.apply_lora(model, kl.LoRAConfig(rank=3, targets=["up"]))
        return model

    def other_optimizer(model: keras.Model) -> keras.Model:
        model.compile("rmsprop", "mse")
        return model

    def not_training(model: keras.Model) -> keras.Model:
        kl.set_adapter(model, "default", trainable=False)
        return model

    def nothing_adapted(model: keras.Model) -> keras.Model:
        return kl.unload_lora(model)

    def twice(model: keras.Model) -> keras.Model:
        model.steps_per_execution = 3
        return model

    # On torch, Keras has no `steps_per_execution` above 1.
    steps = [pytest.param(twice, "a divisor of the 2 batches", id="steps")]
    steps = [] if keras.backend.backend() == "torch" else steps
    return [
        pytest.param(other_config, r"values/up/lora_a: \(5, 2\), expected \(5, 3\)", id="config"),
        pytest.param(other_optimizer, "Adam, expected RMSprop", id="optimizer"),
        pytest.param(not_training, "Expected an adapter that trains", id="frozen"),
        pytest.param(nothing_adapted, "which has none", id="unloaded"),
        *steps,
    ]


@pytest.mark.parametrize(("change", "message"), refusals())
def test_a_state_of_another_run_is_refused_and_nothing_is_changed(
    change: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BrokenError):
        fit(adapted(functional), kl.AdapterCheckpoint(tmp_path, save_freq=2), BreakAfter(3))
    model = change(adapted(functional, 2))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fit(model, kl.AdapterCheckpoint(tmp_path, save_freq=2))
    assert state(model) == before


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenError):
        fit(adapted(functional), kl.AdapterCheckpoint(tmp_path), BreakAfter(3))
    file = tmp_path / "training_state" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(kl.AdapterFileError, match="training_state"):
        fit(adapted(functional), kl.AdapterCheckpoint(tmp_path))


def test_other_data_are_refused_when_they_end_too_early(tmp_path: Path) -> None:
    with pytest.raises(BrokenError):
        fit(adapted(functional), kl.AdapterCheckpoint(tmp_path, save_freq=5), BreakAfter(6))
    model = adapted(functional, 2)
    with pytest.raises(ValueError, match="before the batches that were trained"):
        fit(model, kl.AdapterCheckpoint(tmp_path), steps_per_epoch=3)
    before = trained(model)
    fit(model, epochs=1)
    assert any((a != b).any() for a, b in zip(before, trained(model), strict=True))


def test_an_adapter_of_another_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    kl.save_adapter(adapted(functional), tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    with pytest.raises(kl.AdapterFileError, match="adapter alone.*overwrite=True"):
        fit(adapted(functional, 2), kl.AdapterCheckpoint(tmp_path), epochs=1)
    assert (tmp_path / "adapter.safetensors").read_bytes() == before
    checkpoint, counter = kl.AdapterCheckpoint(tmp_path, overwrite=True), Counter()
    fit(adapted(functional, 2), checkpoint, counter, epochs=1)
    assert (tmp_path / "adapter.safetensors").read_bytes() != before
    fit(adapted(functional, 2), kl.AdapterCheckpoint(tmp_path, overwrite=True), counter, epochs=1)
    assert counter.epochs == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_freq": 0}, "save_freq"),
        ({"save_freq": True}, "save_freq"),
        ({"save_freq": "batch"}, "save_freq"),
        ({"mode": "best"}, "mode"),
        ({"directory": "run-{epoch}"}, "directory"),
    ],
)
def test_invalid_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid {message}|`{message}`|{message}="):
        kl.AdapterCheckpoint(**({"directory": "run"} | options))
