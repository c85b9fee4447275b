"""One SavedModel for many adapters: a value that cannot differ by row is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.exports import PythonInside
from support.mixed_batches import NAMES, adapted, config, small
from support.models import functional, state

import keras_lora as kl


class Folded(keras.layers.Layer):
    """Tokens of all rows as one long list, as experts take them."""

    def __init__(self) -> None:
        super().__init__(name="folded")
        self.inner = keras.layers.Dense(5, name="inner")

    def build(self, shape: Any) -> None:
        self.inner.build((None, shape[-1]))

    def call(self, inputs: Any) -> Any:
        flat = keras.ops.reshape(inputs, (-1, inputs.shape[-1]))
        return keras.ops.reshape(self.inner(flat), keras.ops.shape(inputs))


class TimeFirst(Folded):
    def call(self, inputs: Any) -> Any:
        return keras.ops.swapaxes(self.inner(keras.ops.swapaxes(inputs, 0, 1)), 0, 1)


class KernelReader(Folded):
    def call(self, inputs: Any) -> Any:
        return keras.ops.matmul(inputs, self.inner.kernel)


def around(*layers: keras.layers.Layer) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        x = inputs = keras.Input((None, 5), name="x")
        for layer in layers:
            x = layer(x)
        pooled = keras.layers.GlobalAveragePooling1D(name="pool")(x)
        return keras.Model(inputs, keras.layers.Dense(3, name="head")(pooled), name="outer")

    return make


def named_adapter() -> keras.Model:
    inputs = keras.Input((5,), name="adapter")
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(inputs))


def tokens_in() -> keras.Model:
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(31, 5, name="table")(inputs)
    x = keras.layers.Dense(5, name="up")(x)
    return keras.Model(inputs, keras.layers.GlobalMaxPooling1D()(x))


INNER = config(2, "re:.*inner")
# A model that is refused, its adapter, and the message.
REFUSED: dict[str, tuple[Callable[[], keras.Model], kl.LoRAConfig, str]] = {
    "folded": (around(Folded()), INNER, r"'folded/inner': .*\(None, 5\).* batch is 1009"),
    "time first": (around(TimeFirst()), INNER, r"'folded/inner': .*\(None, 1009, 5\)"),
    "kernel read": (around(KernelReader()), INNER, "'folded/inner': its kernel is read"),
    "head read": (
        around(KernelReader()),
        config(2, ["head"], layers_to_save=["inner"]),
        "'folded/inner': its kernel is read",
    ),
    "all at once": (
        around(Folded(), keras.layers.EinsumDense("btd,dk->tbk", (None, 5), name="turned")),
        config(1, "all-linear"),
        r"(?s)'folded/inner': .*'turned': its einsum btd,dk->tbk",
    ),
    "embedding": (
        tokens_in,
        config(2, ["table"]),
        "'table': the adapters of Embedding cannot differ from row to row",
    ),
    "rows of tokens": (
        tokens_in,
        config(2, ["up"], train_tokens=[3, 29]),
        "'table': the adapters of Embedding cannot differ from row to row",
    ),
    "convolution": (
        around(keras.layers.Conv1D(5, 2, name="conv")),
        config(2, "convolutions"),
        "'conv': the adapters of Conv1D cannot differ from row to row",
    ),
    "norm": (
        functional,
        config(2, ["up"], layers_to_save=["norm"]),
        r"'norm/gamma': only a kernel or a bias.*'norm/beta'",
    ),
    "python": (around(PythonInside(name="python")), config(2, ["head"]), "PyFunc"),
    "input": (named_adapter, config(2, ["head"]), "none of them 'adapter'"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_by_row_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, each, message = REFUSED[case]
    model = adapted(make, (each,))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        kl.export_saved_model(model, tmp_path / "1", adapters=["fr"])
    assert state(model) == before
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path) -> None:
    model = small()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"adapters": []}, "at least one name"),
        ({"adapters": ["zz"]}, "names among .*zz"),
        ({"adapters": ["fr", "fr"]}, "each name once"),
        ({"adapters": ["fr"], "adapter_ids": "uuid"}, "one of .'name', 'index'"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            kl.export_saved_model(model, tmp_path / "1", **options)
    with pytest.raises(ValueError, match="which has none"):
        kl.export_saved_model(functional(), tmp_path / "1", adapters=["fr"])
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = small()
    factor = kl.lora_layers(model)["up"].adapters["de"].b
    factor.assign(np.full(factor.shape, np.inf))
    before = state(model)
    with pytest.raises(ValueError, match=r"infinity in \['up/lora_b'\] of 'de'"):
        kl.export_saved_model(model, tmp_path / "1", adapters=NAMES)
    assert state(model) == before
    assert not list(tmp_path.iterdir())
