"""Verbs in the hooks of callbacks: the run goes on, with what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.models import data
from support.switched import CONTEXTS, answers, two_adapters

import keras_lora as kl

HOOKS = [
    *("on_epoch_begin", "on_epoch_end", "on_train_batch_begin", "on_train_batch_end"),
    *("on_test_batch_begin", "on_test_batch_end"),
    *("on_predict_batch_begin", "on_predict_batch_end"),
]


class At(keras.callbacks.Callback):
    """Calls a verb the first time that a hook is called."""

    def __init__(self, hook: str, verb: Callable[[keras.Model], Any]) -> None:
        super().__init__()
        self._verb, self.called = verb, 0
        setattr(self, hook, self._call)

    def _call(self, *_: Any, **__: Any) -> None:
        self.called += 1
        if self.called == 1:
            self._verb(self.model)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> tuple[keras.Model, Path]:
    """One model for many runs, which keep its functions."""
    folder = tmp_path_factory.mktemp("running")
    model = two_adapters()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    kl.save_adapter(model, folder / "saved", "fr")
    return model, folder / "saved"


def run(model: keras.Model, hook: str, callback: keras.callbacks.Callback) -> None:
    options: Any = {"batch_size": 2, "verbose": 0, "callbacks": [callback]}
    x, y = data(model)
    if "predict" in hook:
        model.predict(x, **options)
    elif "test" in hook:
        model.evaluate(x, y, **options)
    else:
        model.fit(x, y, epochs=2, **options)
    assert callback.called > 1


@pytest.mark.parametrize("hook", HOOKS)
def test_verbs_in_a_callback_let_the_run_go_on(
    hook: str, running: tuple[keras.Model, Path], tmp_path: Path
) -> None:
    model, saved = running
    expected, x = answers(model), data(model)[0]

    def every_verb(model: keras.Model) -> None:
        with kl.merged(model) as plain:
            plain.save(tmp_path / "plain.keras")
        for name, context in CONTEXTS.items():
            if name != "merged":
                with context(model):
                    pass
        kl.load_adapter(model, saved, "it")
        kl.combine_adapters(model, {"fr": 1, "de": 2}, "sum")
        kl.set_adapter(model, ["sum"])
        kl.delete_adapter(model, "it")
        kl.set_adapter(model, "de")
        kl.delete_adapter(model, "sum")

    run(model, hook, At(hook, every_verb))
    np.testing.assert_allclose(model.predict(x, verbose=0), expected["de"], atol=1e-5)
    plain = keras.models.load_model(tmp_path / "plain.keras")
    np.testing.assert_allclose(plain.predict(x, verbose=0), expected["fr"], atol=1e-5)
    kl.set_adapter(model, "fr")


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_epoch_end"])
def test_a_second_adapter_of_a_callback_trains_from_the_next_step_on(hook: str) -> None:
    model = two_adapters()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    kept = {
        f"{p}{i}": np.array(f)
        for p, x in kl.lora_layers(model).items()
        for i, f in enumerate(x.adapters["de"].factors)
    }
    run(model, hook, At(hook, lambda m: kl.apply_lora(m, kl.LoRAConfig(rank=3), name="it")))
    for path, layer in kl.lora_layers(model).items():
        assert np.any(np.array(layer.adapters["it"].b)), path
        for i, factor in enumerate(layer.adapters["de"].factors if "de" in layer.adapters else ()):
            np.testing.assert_array_equal(factor, kept[f"{path}{i}"])
