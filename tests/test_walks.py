"""A verb walks over its model once, or twice where users' code runs in the middle."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import pytest
from rich.console import Console
from support.models import functional

import keras_lora as kl

CONFIG = kl.LoRAConfig(rank=2, layers_to_save=["head"])


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[keras.Model], int]]:
    """How often this package has asked a model for its sublayers."""
    asked: list[int] = []
    real = keras.layers.Layer._flatten_layers

    def counted(layer: keras.layers.Layer, *args: Any, **options: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("keras_lora"):
            asked.append(id(layer))
        return real(layer, *args, **options)

    monkeypatch.setattr(keras.layers.Layer, "_flatten_layers", counted)
    yield lambda model: asked.count(id(model))
    asked.clear()


def two_adapters() -> keras.Model:
    model = kl.apply_lora(functional(), CONFIG, name="fr")
    return kl.apply_lora(model, kl.LoRAConfig(rank=2), name="de")


def one_adapter() -> keras.Model:
    return kl.apply_lora(functional(), CONFIG, name="fr")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with an adapter in it."""
    kl.save_adapter(one_adapter(), tmp_path / "saved", "fr")
    return tmp_path / "saved"


def checkpoint(model: keras.Model, saved: Path) -> None:
    callback = kl.AdapterCheckpoint(saved, "de")
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    callback.set_model(model)
    callback._save({}, 1, 0)


def disabled(model: keras.Model, _: Path) -> None:
    with kl.disable_adapter(model):
        pass


def merged(model: keras.Model, _: Path) -> None:
    with kl.merged(model):
        pass


VERBS: dict[str, tuple[Callable[[], keras.Model], Callable[[keras.Model, Path], Any], int]] = {
    "find_targets": (functional, lambda m, _: kl.find_targets(m), 1),
    "apply_lora": (functional, lambda m, _: kl.apply_lora(m, CONFIG), 1),
    "apply_lora again": (one_adapter, lambda m, _: kl.apply_lora(m, CONFIG, name="it"), 1),
    # The second walk is over the live models, to find any that shares layers with the copy.
    "apply_lora to a copy": (functional, lambda m, _: kl.apply_lora(m, CONFIG, inplace=False), 2),
    "load_adapter": (functional, lambda m, p: kl.load_adapter(m, p, "fr"), 1),
    "load_adapter, replace": (
        one_adapter,
        lambda m, p: kl.load_adapter(m, p, "fr", replace=True),
        1,
    ),
    "save_adapter": (one_adapter, lambda m, p: kl.save_adapter(m, p, "fr", overwrite=True), 1),
    "set_adapter": (two_adapters, lambda m, _: kl.set_adapter(m, "fr"), 1),
    "set_adapter, several": (two_adapters, lambda m, _: kl.set_adapter(m, ["fr", "de"]), 1),
    "disable_adapter": (one_adapter, disabled, 1),
    "delete_adapter": (two_adapters, lambda m, _: kl.delete_adapter(m, "fr"), 1),
    "delete_adapter, the last": (one_adapter, lambda m, _: kl.delete_adapter(m, "fr"), 1),
    "scale_adapter": (one_adapter, lambda m, _: kl.scale_adapter(m, "fr", 2.0), 1),
    "combine_adapters": (
        two_adapters,
        lambda m, _: kl.combine_adapters(m, {"fr": 0.5, "de": 0.5}, "it"),
        1,
    ),
    "merge_lora": (one_adapter, lambda m, _: kl.merge_lora(m), 1),
    "merge_lora to a copy": (one_adapter, lambda m, _: kl.merge_lora(m, inplace=False), 1),
    "unload_lora": (one_adapter, lambda m, _: kl.unload_lora(m), 1),
    "merged": (one_adapter, merged, 2),
    "lora_summary": (one_adapter, lambda m, _: kl.lora_summary(m, Console(quiet=True)), 1),
    "lora_layers": (one_adapter, lambda m, _: kl.lora_layers(m), 1),
    "AdapterCheckpoint": (two_adapters, checkpoint, 2),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_walks_over_its_model_once(
    verb: str, walks: Callable[[keras.Model], int], saved: Path
) -> None:
    make, call, expected = VERBS[verb]
    model = make()
    before = walks(model)
    call(model, saved)
    assert walks(model) - before == expected
