"""Starts that are measured on data: EVA from inputs, LoRA-GA from gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import (
    ALPHA,
    RANK,
    Case,
    adapter,
    config,
    named,
    numpy_of,
    relative,
    snapshot,
)
from support.models import data as data_of
from support.models import functional
from support.starts import best

import keras_lora as kl

INPUTS = {  # of each case, as `(shared, n, d)`
    "dense, sequence": lambda x: x.reshape(1, -1, x.shape[-1]),
    "btnh,nhd->btd": lambda x: x.reshape(1, -1, x.shape[2] * x.shape[3]),
    "bed,edf->bef": lambda x: x.swapaxes(0, 1),
    "bsd,df->bf": lambda x: x.sum(1)[None],
}


def stretched(shape: tuple[int, ...]) -> np.ndarray:
    """Inputs that vary more in some directions than in others."""
    x = np.random.default_rng(0).normal(size=shape)
    return (x * np.linspace(0.2, 3, shape[-1])).astype("float32")


@pytest.mark.parametrize("case", named(*INPUTS), ids=lambda case: case.id)
def test_eva_spans_the_top_directions_of_the_inputs(case: Case) -> None:
    model, x = case.model(), stretched((37, *case.input_shape))
    before = numpy_of(model(x))
    kl.apply_lora(model, config(init="eva"), data=[x[:13], (x[13:26], 0 * x[13:26]), x[26:]])
    assert relative(model(x), before) <= 1e-6
    inputs = INPUTS[case.id](x.astype("float64"))
    a = numpy_of(adapter(model).a).reshape(len(inputs), -1, RANK)
    _, _, v = np.linalg.svd(inputs, full_matrices=False)
    expected = v[:, :RANK].swapaxes(1, 2) @ v[:, :RANK]
    assert relative(a @ a.swapaxes(1, 2), expected) <= 1e-4
    np.testing.assert_allclose(a.swapaxes(1, 2) @ a, [np.eye(RANK)] * len(a), atol=1e-5)
    assert not numpy_of(adapter(model).b).any()


def test_eva_keeps_almost_all_of_the_variance_that_can_be_kept() -> None:
    """Batch by batch, of inputs with more directions than are kept between batches."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(8 * 31, 101)) / np.arange(1, 102)).astype("float32")
    model = keras.Sequential([keras.Input((101,)), keras.layers.Dense(7, name="case")])
    eva = kl.LoRAConfig(rank=5, targets=["case"], init="eva")
    kl.apply_lora(model, eva, data=list(x.reshape(8, 31, 101)))
    a = numpy_of(adapter(model).a)
    kept = np.linalg.norm(x.astype("float64") @ a) ** 2
    assert kept >= 0.999 * (np.linalg.svd(x.astype("float64"))[1][:5] ** 2).sum()


def dense(d: int = 13, k: int = 11) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(29, d)).astype("float32"), rng.normal(size=(29, k)).astype("float32")
    model = keras.Sequential([keras.Input((d,)), keras.layers.Dense(k, name="case")])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model, x, y


def first_step(init: str) -> tuple[np.ndarray, np.ndarray]:
    """How the first step of SGD moves W, and the gradient of W0 in float64."""
    model, x, y = dense()
    layer = model.get_layer("case")
    w0 = numpy_of(layer.kernel)
    error = x.astype("float64") @ w0 + numpy_of(layer.bias) - y
    gradient = x.astype("float64").T @ (2 * error / y.size)
    kl.apply_lora(model, config(init=init), data=[(x, y)] if init == "lora_ga" else None)
    before = [numpy_of(f) for f in adapter(model).factors]
    model.fit(x, y, batch_size=29, verbose=0)
    (a, b), (a0, b0) = [numpy_of(f) for f in adapter(model).factors], before
    return ALPHA / RANK * ((a - a0) @ b0 + a0 @ (b - b0)), gradient


def test_the_first_step_of_lora_ga_is_that_of_the_best_part_of_the_gradient() -> None:
    moved, gradient = first_step("lora_ga")
    size = 11**0.5 / 16  # c^2
    expected = -0.01 * (ALPHA / RANK) ** 2 * size * best(gradient[None], 2 * RANK)[0]
    assert relative(moved, expected) <= 1e-3

    def cosine(moved: np.ndarray, gradient: np.ndarray) -> float:
        return float(-np.vdot(moved, gradient) / np.linalg.norm(moved) / np.linalg.norm(gradient))

    assert cosine(moved, gradient) > 1.2 * cosine(*first_step("kaiming_uniform"))


def test_gradients_add_up_over_batches() -> None:
    (one, x, y), (two, _, _) = dense(), dense()
    two.set_weights(one.get_weights())
    kl.apply_lora(one, config(init="lora_ga"), data=[(x[:28], y[:28])])
    halves = [(x[i : i + 14], y[i : i + 14]) for i in (0, 14)]
    kl.apply_lora(two, config(init="lora_ga"), data=halves)
    pairs = [adapter(model).factors for model in (one, two)]
    (a, b), (other_a, other_b) = ([numpy_of(f) for f in pair] for pair in pairs)
    assert relative(a @ a.T, other_a @ other_a.T) <= 1e-3
    assert relative(b.T @ b, other_b.T @ other_b) <= 1e-3


class Batches(keras.utils.PyDataset):
    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        super().__init__()
        self.x, self.y = x, y

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.x, self.y


def endless(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:
        yield x, y


@pytest.mark.parametrize("make", [Batches, endless, lambda x, y: [(x, y)]])
@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_the_model_is_left_as_it_was_and_goes_on(
    init: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    model = functional()
    x, y = data_of(model)
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(x, y, verbose=0)
    optimizer, values = model.optimizer, snapshot(model.variables)
    flags = [v.trainable for v in model.variables]
    metrics, output = snapshot(model.metrics_variables), numpy_of(model(x))
    kl.apply_lora(model, kl.LoRAConfig(rank=2, init=init), data=make(x, y))
    assert snapshot(model.metrics_variables) == metrics
    assert relative(model(x), output) <= 1e-6
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert relative(again(x), model(x)) <= 1e-6
    kl.unload_lora(model)
    assert snapshot(model.variables) == values
    assert [v.trainable for v in model.variables] == flags
    assert type(model.optimizer) is type(optimizer)
    assert "call" not in vars(model.get_layer("up"))


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"init": "eva"}, {"data": None}, "Invalid `data`: expected a few batches for init='eva'"),
        ({"init": "pissa"}, {}, "Invalid `data`: expected None for init='pissa'"),
        (
            {"init": "eva"},
            {"data": np.ones((6, 5))},
            r"put the batches in a list: data=\[\(x, y\)\]",
        ),
        ({"init": "eva"}, {"data": (np.ones((6, 5)), np.ones(6))}, "put the batches in a list"),
        ({"init": "eva"}, {"data": []}, "Invalid `data`: expected batches that reach each target"),
        ({"init": "lora_ga"}, {}, "expected a compiled model for init='lora_ga'"),
        ({"init": "eva"}, {"data": [np.ones((1, 5))]}, "as many inputs.*'1 inputs at rank 8'"),
        ({"init": "eva"}, {"data": [np.full((7, 5), np.nan)]}, "finite inputs.*NaN or infinity at"),
    ],
)
@pytest.mark.filterwarnings("ignore:The rank is above:UserWarning")
def test_data_that_cannot_be_measured_is_refused(
    options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    model = functional()
    before = snapshot(model.variables), [v.trainable for v in model.variables]
    arguments = {"data": [data_of(model)[0]], **change}
    with pytest.raises(ValueError, match=message):
        kl.apply_lora(model, kl.LoRAConfig(**options), **arguments)
    assert (snapshot(model.variables), [v.trainable for v in model.variables]) == before
    assert not kl.lora_layers(model)


def test_gradients_that_are_not_finite_are_refused() -> None:
    model = functional()
    model.compile("sgd", "mse")
    x, y = data_of(model)
    before = snapshot(model.variables)
    with pytest.raises(ValueError, match="finite gradients.*NaN or infinity at"):
        kl.apply_lora(
            model, kl.LoRAConfig(rank=2, init="lora_ga"), data=[(x, np.full_like(y, np.nan))]
        )
    assert snapshot(model.variables) == before
    assert not kl.lora_layers(model)


def test_layers_and_models_that_cannot_be_measured_are_refused() -> None:
    tokens = keras.Input((3,), dtype="int32")
    hidden = keras.layers.Embedding(13, 5, name="tokens")(tokens)
    model = keras.Model(tokens, keras.layers.Dense(7, name="up")(hidden))
    batches = [np.ones((6, 3), "int32")]
    eva = kl.LoRAConfig(rank=2, init="eva", targets=["tokens", "up"])
    with pytest.raises(ValueError, match=r"\['tokens'\] can take, which are not linear"):
        kl.apply_lora(model, eva, data=batches)
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"]), name="plain")
    with pytest.raises(ValueError, match=r"start without data for a model with the adapters \['pl"):
        kl.apply_lora(model, kl.LoRAConfig(rank=2, init="eva", targets=["up"]), data=batches)
    with pytest.raises(ValueError, match="Invalid `init`: expected a start that needs no data"):
        kl.LoRADense(7, init="eva").build((None, 5))
