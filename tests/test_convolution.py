"""What is particular to convolutions; the invariants of every kind are in `test_layers.py`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from rich.console import Console
from support.cases import (
    ALPHA,
    BY_ID,
    RANK,
    ROUNDING,
    Case,
    adapted,
    adapter,
    named,
    numpy_of,
    reference_delta,
    reference_output,
    relative,
)

import keras_lora as kl

SCALE = ALPHA / RANK


def stepped(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    """One step of gradient descent at a rate of 1."""
    # Eagerly TensorFlow compiles a grouped convolution at each call.
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(x, y, batch_size=len(x), verbose=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("conv2d, same", {"filters": 7}),
        ("conv2d, same", {"filters": 61}),
        ("conv2d, same", {"kernel_size": 1, "strides": 1}),
        ("conv2d, groups", {"filters": 62}),
    ],
)
def test_gradients_are_those_through_the_kernel(name: str, options: dict[str, Any]) -> None:
    """`dA = s dW B^T` and `dB = s A^T dW`; the gradient of the input is that of a bias before."""
    case = BY_ID[name]
    model, x = case.model(**options), case.batch()
    axis = 1 if case.options.get("data_format") == "channels_first" else -1
    biased = keras.Sequential(
        [keras.Input(case.input_shape), Shift(axis, name="shift"), model.get_layer("case")]
    )
    y = np.random.default_rng(5).normal(size=biased(x).shape)
    kl.apply_lora(
        biased, kl.LoRAConfig(rank=1, alpha=ALPHA, layers_to_save=["shift"], targets=["case"])
    )
    (layer,) = kl.lora_layers(biased).values()
    rng = np.random.default_rng(3)
    for factor in layer.adapters["default"].factors:
        factor.assign(rng.normal(scale=0.4, size=factor.shape))
    a, b = (numpy_of(f) for f in layer.adapters["default"].factors)
    whole = kl.merge_lora(biased, inplace=False)
    w = numpy_of(whole.get_layer("case").kernel)

    stepped(whole, x, y)
    stepped(biased, x, y)
    d_w = (w - numpy_of(whole.get_layer("case").kernel)).reshape(-1, b.shape[1])
    new_a, new_b = (numpy_of(f) for f in layer.adapters["default"].factors)
    assert relative((a - new_a).reshape(-1, 1), ALPHA * d_w @ b.T) <= 1e-4
    assert relative(b - new_b, ALPHA * a.reshape(-1, 1).T @ d_w) <= 1e-4
    shifts = [numpy_of(m.get_layer("shift").weights[0]) for m in (biased, whole)]
    assert relative(*shifts) <= 1e-4


@keras.saving.register_keras_serializable("test_convolution")
class Shift(layers.Layer):
    """Adds a trained number to each channel."""

    def __init__(self, axis: int, **options: Any) -> None:
        super().__init__(**options)
        self.axis = axis

    def build(self, shape: tuple[int, ...]) -> None:
        sides = [1] * len(shape)
        sides[self.axis] = shape[self.axis]
        self.shift = self.add_weight(shape=sides, initializer="zeros")

    def call(self, inputs: Any) -> Any:
        return inputs + self.shift

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}


def vision(filters: int = 7, **options: Any) -> keras.Model:
    """Convolutions with statistics behind them, an embedding of each pixel's class, and a head."""
    image = keras.Input((11, 13, 3))
    x = layers.Conv2D(5, 3, activation="relu", name="stem", **options)(image)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Conv2D(filters, 2, name="body", **options)(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(5, name="up", **options)(x)
    return keras.Model(image, layers.Dense(2, name="head", **options)(x))


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(2).normal(1, 2, size=(count, 11, 13, 3)).astype("float32")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("convolutions", ["stem", "body"]),
        ("all", ["stem", "body", "up"]),
        ("all-linear", ["up"]),
    ],
)
def test_presets_select_families(targets: str, expected: list[str]) -> None:
    assert [t.path for t in kl.find_targets(vision(), targets)] == expected


def test_a_convolution_that_makes_the_output_is_a_head() -> None:
    model = keras.Sequential(
        [keras.Input((7, 3)), layers.Conv1D(5, 2, name="body"), layers.Conv1D(2, 1, name="scores")]
    )
    assert [t.path for t in kl.find_targets(model, "convolutions")] == ["body"]


def test_the_summary_names_the_kinds_that_were_left() -> None:
    def line(targets: str) -> str:
        console = Console(width=100, file=io.StringIO(), record=True)
        kl.lora_summary(kl.apply_lora(vision(), kl.LoRAConfig(rank=2, targets=targets)), console)
        return console.export_text().splitlines()[-1]

    assert line("all-linear").startswith("not adapted: 2 Conv2D; targets='all'")
    assert line("convolutions").startswith("not adapted: 2 Dense; targets='all'")
    assert "not adapted" not in line("all")


def test_statistics_behind_a_frozen_convolution_stay() -> None:
    model, x = vision(), images()
    model.compile("sgd", "mse")
    model.fit(x, np.ones((4, 2)), verbose=0)  # so that the statistics are not those of the start
    norm = model.get_layer("norm")
    before = [numpy_of(v) for v in norm.weights]
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets="convolutions", layers_to_save=["head"]))
    model.compile("sgd", "mse")
    model.fit(x, np.ones((4, 2)), verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(norm.weights, before, strict=True))
    assert not norm.trainable
    assert kl.unload_lora(model).get_layer("norm").trainable


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="jax compiles, torch does not")
def test_xla_trains_as_without() -> None:
    changes = []
    for jit in (False, True):
        keras.utils.set_random_seed(1)
        model = kl.apply_lora(vision(31), kl.LoRAConfig(rank=1, targets="convolutions"))
        model.compile("sgd", "mse", jit_compile=jit)
        model.fit(images(), np.ones((4, 2)), verbose=0)
        factors = [x.adapters["default"].b for x in kl.lora_layers(model).values()]
        changes.append(np.concatenate([numpy_of(b).ravel() for b in factors]))
    assert relative(*changes) <= 1e-4


def test_dropout_acts_in_training_after_a_conversion_in_place() -> None:
    model = adapted(BY_ID["conv3d, no bias"], dropout=0.5)
    x = BY_ID["conv3d, no bias"].batch()
    still = numpy_of(model(x))
    np.testing.assert_array_equal(numpy_of(model(x, training=False)), still)
    draws = [numpy_of(model(x, training=True)) for _ in range(2)]
    assert min(relative(draw, still) for draw in draws) > 0.05
    assert relative(*draws) > 0.05


def test_bfloat16_keeps_an_update_that_the_kernel_would_lose() -> None:
    """Beside weights of 1, a delta of 1e-4 is below half of bfloat16's last digit."""
    case = BY_ID["conv2d, same"]
    model, x = case.model(dtype="bfloat16", activation=None, use_bias=False), case.batch()
    (layer,) = kl.lora_layers(adapted(case, model)).values()
    layer.assign_base(np.ones(layer.base_kernel.shape))
    x[..., 1], x[..., 2:] = -x[..., 0], 0  # the product with a kernel of ones is zero
    a, b = adapter(model).factors
    b.assign(numpy_of(b) * 1e-4)
    delta = reference_delta(case, numpy_of(a), numpy_of(b), SCALE)
    assert relative(model(x), reference_output(case, model, x, delta)) <= ROUNDING["bfloat16"]


def test_direct_use_trains_saves_and_loads(tmp_path: Path) -> None:
    model = keras.Sequential(
        [
            keras.Input((13, 3)),
            kl.LoRAConv1D(4, 3, padding="causal", rank=2, dropout=0.1),
            layers.Reshape((13, 4, 1)),
            kl.LoRAConv2D(6, 2, rank=2, use_dora=True),
            kl.LoRADepthwiseConv2D((3, 2), depth_multiplier=2, rank=2),
            kl.LoRAConv2DTranspose(6, 2, rank=2, train_bias=True),
            layers.Reshape((11, 3, 6, 1)),
            kl.LoRAConv3D(
                2, (2, 3, 1), adapters={"a": {"rank": 1, "alpha": 2}, "b": {"rank": 2, "alpha": 2}}
            ),
        ]
    )
    x = np.random.default_rng(0).normal(size=(5, 13, 3)).astype("float32")
    model.compile("sgd", "mse")
    model.fit(x, np.ones(model(x).shape), verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(model(x)))
    assert [v.name for v in loaded.trainable_variables] == [
        v.name for v in model.trainable_variables
    ]
    plain = kl.merge_lora(loaded)
    assert {type(layer) for layer in plain.layers} == {
        *(layers.Conv1D, layers.Conv2D, layers.DepthwiseConv2D, layers.Conv2DTranspose),
        *(layers.Conv3D, layers.Reshape),
    }
    assert relative(plain(x), model(x)) <= 1e-5


def test_adapter_files_are_keyed_by_the_layer(tmp_path: Path) -> None:
    model = kl.apply_lora(vision(), kl.LoRAConfig(rank=2, targets="convolutions"))
    for layer in kl.lora_layers(model).values():
        layer.adapters["default"].b.assign(np.ones(layer.adapters["default"].b.shape))
    kl.save_adapter(model, tmp_path / "a")
    base = kl.merge_lora(model, inplace=False)
    kl.load_adapter(kl.unload_lora(model), tmp_path / "a")
    assert relative(model(images()), base(images())) <= 1e-5


@pytest.mark.parametrize(
    "case", named("conv2d, same", "conv2d, transposed", "conv2d, depthwise"), ids=lambda c: c.id
)
def test_weights_of_the_base_go_into_the_adapted_layer(case: Case, tmp_path: Path) -> None:
    base, x = case.model(), case.batch()
    base.save_weights(tmp_path / "m.weights.h5")
    model = kl.apply_lora(case.model(), kl.LoRAConfig(rank=RANK, targets=["case"]))
    for variable in model.weights[:2]:
        variable.assign(np.zeros(variable.shape))
    with pytest.warns(UserWarning, match="base"):
        model.load_weights(tmp_path / "m.weights.h5")
    assert relative(model(x), base(x)) <= 1e-6
    assert relative(kl.merge_lora(adapted(case), inplace=False)(x), adapted(case)(x)) <= 1e-5


@pytest.mark.parametrize(("size", "channels"), [(1, 5), (3, 1)])
def test_a_depthwise_kernel_that_no_rank_makes_smaller_is_refused(size: int, channels: int) -> None:
    conv = layers.DepthwiseConv1D(size, name="thin")
    model = keras.Sequential([keras.Input((7, channels)), conv, layers.Dense(2)])
    message = rf"'thin': .* {size} by {channels} as a matrix.* layers_to_save=\['thin'\]"
    with pytest.raises(ValueError, match=message):
        kl.apply_lora(model, kl.LoRAConfig(rank=1, targets="convolutions"))


class Standardised(layers.Conv2D):
    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        return super().convolution_op(inputs, kernel - ops.mean(kernel))


def test_a_convolution_of_ones_own_is_left_out() -> None:
    image = keras.Input((7, 11, 3))
    x = Standardised(5, 2, name="own")(layers.Conv2D(5, 2, name="known")(image))
    model = keras.Model(image, layers.Dense(2)(x))
    with pytest.warns(UserWarning, match=r"leaves out 'own' .*: its class overrides"):
        assert [t.path for t in kl.find_targets(model, "convolutions")] == ["known"]
