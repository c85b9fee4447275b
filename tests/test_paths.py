"""Paths as users give them, for every public function that takes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import functional

import keras_lora as kl

NAMES = {"directory", "path", "source", "target", "file"}
TAKE_PATHS = sorted(
    name
    for name in kl.__all__
    if inspect.isfunction(function := getattr(kl, name))
    and NAMES & set(inspect.signature(function).parameters)
)


def call(name: str, path: str) -> Any:
    """The function with this path, and something for the arguments that it must have."""
    function: Callable[..., Any] = getattr(kl, name)
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2))
    known = {"model": model, "adapter": path, "name": "default"}
    parameters = inspect.signature(function).parameters.items()
    given = {
        key: path if key in NAMES else known[key]
        for key, parameter in parameters
        if key in NAMES or parameter.default is parameter.empty
    }
    return function(**given)


def test_the_functions_that_take_paths() -> None:
    assert len(TAKE_PATHS) >= 13


@pytest.mark.parametrize("name", [*TAKE_PATHS, "AdapterCheckpoint"])
def test_no_path_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For Python `""` is the working directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected a path|KerasHub"):
        call(name, "")
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2))
    kl.save_adapter(model, "~/adapters/fr")
    kl.load_adapter(model, Path("~/adapters/fr"), "fr")
    kl.export_saved_model(model, "~/served/1")
    assert kl.check_saved_model("~/served/1").operations
    assert kl.AdapterCheckpoint("~/runs").directory == tmp_path / "home/runs"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
