"""Separable convolutions: one layer with two matrices, each with adapters of its own."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from support.cases import numpy_of, randomize, relative, snapshot

import keras_lora as kl
from keras_lora.layers import AdapterBank

NAMES = ["separable/depthwise_kernel", "separable/pointwise_kernel"]
OPTIONS = {
    "SeparableConv1D": ((13, 5), {"kernel_size": 3, "padding": "same", "use_bias": False}),
    "SeparableConv2D": (
        (11, 13, 5),
        {"kernel_size": (3, 2), "strides": 2, "depth_multiplier": 3, "activation": "tanh"},
    ),
}
LAYERS = pytest.mark.parametrize("kind", OPTIONS)


def base(kind: str) -> tuple[keras.Model, np.ndarray]:
    shape, options = OPTIONS[kind]
    image = keras.Input(shape)
    layer = getattr(layers, kind)(7, name="separable", **options)
    model = keras.Model(image, layers.Dense(2, name="head")(layers.Flatten()(layer(image))))
    randomize(model.weights)
    return model, np.random.default_rng(1).normal(size=(3, *shape)).astype("float32")


def randomized(model: keras.Model) -> keras.Model:
    for bank in kl.lora_layers(model)["separable"].banks.values():
        randomize(f for x in bank.adapters.values() for f in x.factors)
    return model


@LAYERS
@pytest.mark.parametrize("use_dora", [False, True])
def test_both_kernels_are_adapted_and_merged(kind: str, use_dora: bool) -> None:
    model, x = base(kind)
    before, output = snapshot(model.weights), numpy_of(model(x))
    config = kl.LoRAConfig(rank=2, alpha=3, targets="convolutions", use_dora=use_dora)
    assert [t.path for t in kl.find_targets(model, "convolutions")] == NAMES
    kl.apply_lora(model, config)
    assert relative(model(x), output) <= 1e-6

    plain = model.get_layer("separable")
    kernels = [numpy_of(bank.site.matrix) for bank in plain.banks.values()]
    adapted = numpy_of(randomized(model)(x))
    assert relative(adapted, output) > 0.01
    if not use_dora:
        for bank, w0, own in zip(
            plain.banks.values(),
            kernels,
            (plain.depthwise_kernel, plain.pointwise_kernel),
            strict=True,
        ):
            a, b = (numpy_of(f) for f in bank.adapters["default"].factors)
            delta = np.tensordot(a, b, 1).reshape(w0.shape)
            assert relative(own, w0 + 1.5 * delta) <= 1e-6
    with kl.disable_adapter(model):
        assert relative(model(x), output) <= 1e-6
    assert relative(kl.merge_lora(model, inplace=False)(x), adapted) <= 1e-5
    kl.unload_lora(model)
    assert snapshot(model.weights) == before


def test_training_moves_the_factors_alone_and_both_files_keep_them(tmp_path: Path) -> None:
    model, x = base("SeparableConv2D")
    config = kl.LoRAConfig(rank=2, targets=["separable"], dropout=0.1, bias="lora_only")
    kl.apply_lora(model, config)
    frozen = [v for v in model.variables if not v.trainable and "seed" not in v.path]
    before = snapshot(frozen)
    model.compile("sgd", "mse")
    model.fit(x, np.ones((3, 2)), epochs=2, verbose=0)
    assert snapshot(frozen) == before
    assert all(numpy_of(b.adapters["default"].b).any() for b in banks(model))

    expected = numpy_of(model(x))
    model.save(tmp_path / "m.keras")
    assert relative(keras.models.load_model(tmp_path / "m.keras")(x), expected) == 0
    kl.save_adapter(model, tmp_path / "adapter")
    kl.load_adapter(kl.unload_lora(model), tmp_path / "adapter")
    assert relative(model(x), expected) <= 1e-6


def banks(model: keras.Model) -> list[AdapterBank]:
    return list(kl.lora_layers(model)["separable"].banks.values())


def test_one_matrix_can_be_named_and_goes_into_no_file_of_peft(tmp_path: Path) -> None:
    model, x = base("SeparableConv2D")
    output = numpy_of(model(x))
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["pointwise_kernel"]), name="one")
    kl.apply_lora(model, kl.LoRAConfig(rank=3, targets=["separable"]), name="both")
    assert [[*bank.adapters] for bank in banks(model)] == [["both"], ["one", "both"]]
    kl.set_adapter(model, ["one", "both"])
    expected = numpy_of(randomized(model)(x))
    assert relative(expected, output) > 0.01
    with pytest.raises(ValueError, match="adapters that no `.keras` file"):
        model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="linear layers, embeddings and experts.*'separable/"):
        kl.save_peft_adapter(model, tmp_path / "peft", "both")
    assert relative(kl.merge_lora(model)(x), expected) <= 1e-5
