"""`freeze_a` (LoRA-FA): `B` trains alone, and `A` stays as it starts."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import numpy_of
from support.optimizers import MIDDLE, OUT, WIDTH, adapt, base, compile_, steps, values

import keras_lora as kl

RATE = 0.05


def trained(model: keras.Model) -> list[str]:
    return [v.name for v in model.trainable_variables]


def frozen(**options: Any) -> keras.Model:
    model = base()
    adapt(model, "a", freeze_a=True, **options)
    compile_(model, keras.optimizers.Adam(RATE))
    return model


@pytest.mark.parametrize("eager", [True, False])
def test_b_moves_along_its_gradient_and_a_stays(eager: bool) -> None:
    model = base()
    adapt(model, "a", alpha=3, freeze_a=True)
    model.compile(keras.optimizers.SGD(RATE), "mse", run_eagerly=eager)
    layer, head = model.layers
    w, c, v, d = (numpy_of(x).astype("float64") for x in base().get_weights())
    a, b = (x.astype("float64") for x in values(model, "a"))
    x, y = np.random.default_rng(5).normal(size=(2, 3, WIDTH))
    y = y[:, :OUT]
    h = np.tanh(x @ w + c + 1.5 * x @ a @ b)  # (3, 17)
    dy = 2 * (h @ v + d - y) / y.size
    db = 1.5 * (x @ a).T @ (dy @ v.T * (1 - h**2))  # (2, 17)
    model.train_on_batch(x, y)
    found = values(model, "a")
    np.testing.assert_array_equal(found[0], a.astype("float32"))
    np.testing.assert_allclose(found[1], b - RATE * db, rtol=1e-4, atol=1e-6)
    assert b.shape == (2, MIDDLE)
    assert (layer.name, head.name) == ("up", "head")


OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": ({}, ["lora_b"]),
    "DoRA": ({"use_dora": True}, ["lora_b", "lora_magnitude"]),
    "dropout and a head": (
        {"dropout": 0.5, "layers_to_save": ["head"]},
        ["lora_b", "kernel", "bias"],
    ),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_is_no_trainable_variable(kind: str) -> None:
    options, names = OPTIONS[kind]
    model = frozen(**options)
    assert trained(model) == names
    steps(model, 1)
    assert len(model.optimizer._trainable_variables) == len(names)
    for trainable in (False, True):
        model.get_layer("up").trainable = trainable
    assert "lora_a" not in trained(model)
    kl.set_adapter(model, None)
    assert trained(model) == []
    kl.set_adapter(model, "a")
    assert trained(model) == names


def test_the_count_of_what_trains_is_of_b() -> None:
    model, printed = frozen(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        kl.print_trainable_parameters(model)
    whole = WIDTH * MIDDLE + MIDDLE + MIDDLE * OUT + OUT + 2 * (WIDTH + MIDDLE)
    expected = f"trainable params: {2 * MIDDLE} || all params: {whole} || "
    assert printed.getvalue().startswith(expected)


def higher(model: keras.Model) -> None:
    adapt(model, "bb", rank=3)


@pytest.mark.parametrize("other", [lambda model: adapt(model, "bb"), higher])
def test_adapters_that_train_a_and_those_that_do_not_take_turns(
    other: Callable[[keras.Model], None],
) -> None:
    model, unbroken = frozen(), frozen()
    steps(unbroken, 4)
    steps(model, 2)
    other(model)
    before = values(model, "bb")
    assert trained(model) == ["lora_a", "lora_b"]
    steps(model, 2)
    for value, old in zip(values(model, "bb"), before, strict=True):
        assert abs(value - old).max() > 0.01
    kl.set_adapter(model, "a")
    assert trained(model) == ["lora_b"]
    steps(model, 2)
    for value, right in zip(values(model, "a"), values(unbroken, "a"), strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-4, atol=1e-6)


def test_both_at_once_train_what_each_trains() -> None:
    model = frozen()
    adapt(model, "bb", rank=3)
    kl.set_adapter(model, ["bb", "a"])
    assert trained(model) == ["lora_a", "lora_b", "lora_b_1"]
    before = values(model, "a")[0]
    steps(model, 1)
    np.testing.assert_array_equal(values(model, "a")[0], before)


def test_files_keep_a_and_that_it_is_frozen(tmp_path: Path) -> None:
    model, x = frozen(), np.ones((3, WIDTH))
    steps(model, 1)
    kl.save_adapter(model, tmp_path / "a", "a")
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    loaded, adapted = base(), base()
    kl.load_adapter(loaded, tmp_path / "a")
    other = base()
    adapt(other, "default")
    with pytest.raises(kl.AdapterFileError, match=r"freeze_a=True, where the active"):
        kl.load_adapter(other, tmp_path / "a", replace=True)
    adapt(adapted, "a", freeze_a=True)
    for factor in kl.lora_layers(adapted)["up"].adapters["a"].factors:
        factor.assign(np.ones(factor.shape))
    adapted.load_weights(tmp_path / "m.weights.h5")
    for found in (loaded, adapted, keras.saving.load_model(tmp_path / "m.keras")):
        assert trained(found) == ["lora_b"]
        np.testing.assert_allclose(numpy_of(found(x)), numpy_of(model(x)), rtol=1e-5, atol=1e-6)


def test_a_layer_by_hand_freezes_a() -> None:
    layer = kl.LoRADense(5, rank=2, freeze_a=True)
    layer.build((None, 3))
    assert [v.name for v in layer.trainable_variables] == ["lora_b"]
    assert kl.LoRADense.from_config(layer.get_config()).get_config() == layer.get_config()


def test_an_embedding_has_an_a_that_must_train() -> None:
    model = keras.Sequential([keras.layers.Embedding(13, 5, name="tokens")])
    model.build((None, 7))
    config = kl.LoRAConfig(rank=2, targets=["tokens"], freeze_a=True)
    with pytest.raises(ValueError, match=r"False for \['tokens'\], whose A starts at zero"):
        kl.apply_lora(model, config)
    assert not kl.lora_layers(model)
    with pytest.raises(ValueError, match="False for a layer whose A starts at zero"):
        kl.LoRAEmbedding(13, 5, rank=2, freeze_a=True)
