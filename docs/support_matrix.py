"""Writes `docs/support.md`: which kind of layer takes which option, each of which is tried.

`make support` runs it. A small model of each kind is adapted with the option, and is compared with
what it should be; a refusal is a `ValueError` of the library.

    PYTHONPATH=tests python docs/support_matrix.py [file]
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import layers
from support.variables import MIXTURES

import keras_lora as kl
from keras_lora.layers import AdapterBank

PAGE = Path("docs/support.md")
HEAD = """\
# What is supported

Which kind of layer takes which option. Written by `make support`, which tries each cell on a small
model; not edited by hand. All of these kinds are merged exactly. "no" is an error that says so,
before anything is changed. `dropout` of a config applies where it can, and has no effect on the
kinds with a "no". What goes to PEFT is on
[a page of its own](architectures.md).

"""
RANK, TARGETS = 2, f"re:{'{'}NAME{'}'}(/.*)?"
DATA = ("eva", "lora_ga")
Shape = tuple[int, ...]
Make = Callable[[], keras.layers.Layer]

NAME = "adapted"
TARGETS = f"re:{NAME}(/.*)?"
STEPS, IMAGE = (5, 4), (6, 6, 4)
KINDS: dict[str, tuple[Shape, Make]] = {
    "`Dense`": ((4,), lambda: layers.Dense(6, name=NAME)),
    "`EinsumDense`": (STEPS, lambda: layers.EinsumDense("abc,cd->abd", (5, 6), name=NAME)),
    "`Embedding`": ((5,), lambda: layers.Embedding(11, 6, name=NAME)),
    "`ReversibleEmbedding`": ((5,), lambda: layers.ReversibleEmbedding(11, 6, name=NAME)),
    "`Conv1D`, `2D`, `3D`, grouped too": (IMAGE, lambda: layers.Conv2D(6, 3, groups=2, name=NAME)),
    "`Conv1DTranspose`, `2D`, `3D`": (IMAGE, lambda: layers.Conv2DTranspose(6, 3, name=NAME)),
    "`DepthwiseConv1D`, `2D`": (IMAGE, lambda: layers.DepthwiseConv2D(3, name=NAME)),
    "`SeparableConv1D`, `2D`": (IMAGE, lambda: layers.SeparableConv2D(6, 3, name=NAME)),
    "`LSTM`, `GRU`, `SimpleRNN`": (STEPS, lambda: layers.LSTM(6, name=NAME)),
    "`ConvLSTM1D`, `2D`, `3D`": ((3, 6, 6, 4), lambda: layers.ConvLSTM2D(2, 3, name=NAME)),
    "experts of KerasHub's mixtures": ((7, 5), lambda: MIXTURES["mixtral"](name=NAME)),
    "a bare variable, a table of positions": (
        (5, 4),
        lambda: keras_hub.layers.PositionEmbedding(5, name=NAME),
    ),
}


class Case:
    """A small model of one kind."""

    def __init__(self, shape: Shape, make: Make) -> None:
        self.shape, self.make = shape, make

    def model(self) -> keras.Model:
        keras.utils.set_random_seed(7)
        head = [layers.Flatten(), layers.Dense(3, name="head")]
        return keras.Sequential([keras.Input(self.shape), self.make(), *head], name="model")

    def inputs(self) -> np.ndarray:
        """Numbers that are token ids too."""
        return np.random.default_rng(5).integers(0, 11, (2, *self.shape)).astype("float32")

    def adapted(self, **options: Any) -> keras.Model:
        """The model with an adapter, which is as its base at first, and then random."""
        model, x = self.model(), self.inputs()
        base = np.array(model(x))
        model.compile("sgd", "mse")
        config = kl.LoRAConfig(rank=RANK, targets=TARGETS, **options)
        data = [(x, np.ones((2, 3)))] if options.get("init") in DATA else None
        kl.apply_lora(model, config, data=data)
        np.testing.assert_allclose(np.array(model(x)), base, rtol=1e-4, atol=1e-4)
        rng = np.random.default_rng(11)
        for bank in banks(model):
            for factor in bank.adapters["default"].factors:
                factor.assign(np.array(factor) + rng.normal(scale=0.1, size=factor.shape))
        assert np.abs(np.array(model(x)) - base).max() > 1e-3
        return model


def banks(model: keras.Model) -> Iterator[AdapterBank]:
    for layer in kl.lora_layers(model).values():
        yield from layer.banks.values()


def merges(case: Case, **options: Any) -> None:
    model, x = case.adapted(**options), case.inputs()
    adapted = np.array(model(x))
    np.testing.assert_allclose(np.array(kl.merge_lora(model)(x)), adapted, rtol=1e-3, atol=1e-3)


def has_dropout(case: Case) -> None:
    model, x = case.adapted(dropout=0.5), case.inputs()
    # A layer may order its sums differently in training.
    if np.allclose(np.array(model(x, training=True)), np.array(model(x)), rtol=1e-3, atol=1e-3):
        raise ValueError("dropout has no effect")


def is_saved(case: Case) -> None:
    model, x, loaded = case.adapted(), case.inputs(), case.model()
    with tempfile.TemporaryDirectory() as folder:
        kl.save_adapter(model, f"{folder}/adapter")
        kl.load_adapter(loaded, f"{folder}/adapter")
    np.testing.assert_array_equal(np.array(loaded(x)), np.array(model(x)))


def has_adapter_by_row(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kl.export_saved_model(case.adapted(), f"{folder}/1", adapters=["default"])


def is_quantized(case: Case) -> None:
    model = case.model()
    model.quantize("int8")
    if model.get_layer(NAME).quantization_mode is None:
        raise ValueError("a kind that Keras does not quantize")
    x = case.inputs()
    base = np.array(model(x))
    kl.apply_lora(model, kl.LoRAConfig(rank=RANK, targets=TARGETS))
    np.testing.assert_array_equal(np.array(model(x)), base)
    kl.merge_lora(model, quantized="dequantize")


def starts(*inits: str) -> Callable[[Case], None]:
    def begin(case: Case) -> None:
        for init in inits:
            merges(case, init=init)

    return begin


OPTIONS: dict[str, Callable[[Case], None]] = {
    "adapter files": is_saved,
    "`dropout`": has_dropout,
    "`use_rslora`": lambda case: merges(case, use_rslora=True),
    "`use_dora`": lambda case: merges(case, use_dora=True),
    "`freeze_a`": lambda case: merges(case, freeze_a=True),
    '`init`: `"orthogonal"`, `"pissa"`, `"olora"`': starts("orthogonal", "pissa", "olora"),
    '`"eva"`, `"lora_ga"`': starts(*DATA),
    "`train_tokens`": lambda case: merges(case, train_tokens=[1, 2]),
    "an adapter for each row": has_adapter_by_row,
    "an int8 base": is_quantized,
}


def tried(case: Case, option: Callable[[Case], None]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            option(case)
    except ValueError:
        return "no"
    return "yes"


def page() -> str:
    lines = [["kind", *OPTIONS], ["---"] * (len(OPTIONS) + 1)]
    for kind, (shape, make) in KINDS.items():
        case = Case(shape, make)
        merges(case)  # whatever else is refused
        lines.append([kind, *(tried(case, option) for option in OPTIONS.values())])
    return HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(file: Path) -> None:
    file.write_text(page())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE)
