"""ONNX and LiteRT files: loaded by their runtimes, and compared with the adapted model."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import onnx
import pytest
import tensorflow as tf
from keras import layers
from support.exports import adapted, classifier, large, predict
from support.models import composite, functional, state
from support.runtimes import (
    ENCODER,
    EXPORTS,
    FIXED,
    MODELS,
    Unused,
    each_export,
    feeds,
    llama,
    recurrent,
    unused,
)

import keras_lora as kl
from keras_lora.export.endpoints import serve
from keras_lora.export.runtimes import conversion, litert
from keras_lora.export.runtimes import onnx as onnx_file

BATCHES = ((1, 4), (3, 11), (7, 11))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_answers_equal_predict(name: str, tmp_path: Path) -> None:
    make, shapes, outputs = MODELS[name]
    model = adapted(make)
    before, given = state(model), [feeds(shapes, *sizes) for sizes in BATCHES]
    expected = [predict(model, batch) for batch in given]
    for kind, (export, run) in EXPORTS.items():
        fixed = FIXED.get(name, {}) if kind == "litert" else {}
        report = export(model, tmp_path / kind, **fixed)
        assert state(model) == before
        assert report.inputs == {
            name: (fixed.get("batch_size"), *(x or fixed.get("sequence_length") for x in shape))
            for name, shape in shapes.items()
        }
        assert sorted(report.outputs) == sorted(outputs)
        assert report.difference < 1e-5
        for i in allowed(fixed):
            received = run(tmp_path / kind, given[i])
            assert sorted(received) == sorted(outputs)
            for output, value in zip(outputs, expected[i], strict=True):
                np.testing.assert_allclose(received[output], value, rtol=1e-4, atol=1e-4)


def allowed(fixed: dict[str, int]) -> list[int]:
    """The indices of the batches that a file of these fixed sizes takes."""
    sizes = (fixed.get("batch_size"), fixed.get("sequence_length"))
    return [
        i
        for i, batch in enumerate(BATCHES)
        if all(b == size for b, size in zip(batch, sizes, strict=True) if size)
    ]


def test_an_input_without_effect_keeps_its_name(tmp_path: Path) -> None:
    model = adapted(unused)
    given = feeds({"spare": (3,), "used": (5,)}, 3, 11)
    expected = np.array(model(given))
    for kind, (export, run) in EXPORTS.items():
        export(model, tmp_path / kind)
        np.testing.assert_allclose(run(tmp_path / kind, given)["output_0"], expected, rtol=1e-4)


def tied() -> keras.Model:
    """A matrix that serves as an embedding and, transposed, as the head."""
    sizes = ENCODER | {"vocabulary_size": 1009, "hidden_dim": 96}
    backbone = keras_hub.models.GPT2Backbone(**sizes, max_sequence_length=13)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


@pytest.mark.slow
@each_export
@pytest.mark.parametrize("make", [large, tied])
def test_weights_are_stored_once_and_nothing_names_the_package(
    kind: str, make: Callable[[], keras.Model], tmp_path: Path
) -> None:
    model = adapted(make)
    EXPORTS[kind][0](model, tmp_path / "model")
    data = (tmp_path / "model").read_bytes()
    weights = sum(np.array(v).nbytes for v in kl.merge_lora(model).weights)
    assert 0.99 * weights <= len(data) <= 1.02 * weights + 2**17  # biases of zeros are dropped
    assert b"lora" not in data


def test_the_axes_of_an_onnx_file_are_named_and_its_operations_standard(tmp_path: Path) -> None:
    kl.export_onnx(composite(), tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    axes = proto.graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in axes] == ["batch", "sequence_1", 5]
    assert {node.domain for node in proto.graph.node} == {""}


# --- Numbers --------------------------------------------------------------------------------------


def test_the_tails_of_exact_gelu(tmp_path: Path) -> None:
    inputs = keras.Input((1,), name="x")
    identity = layers.Dense(1, kernel_initializer="ones", name="up")(inputs)
    outputs = layers.Activation(lambda x: keras.ops.gelu(x, False), name="gelu")(identity)
    x = np.linspace(-40, 40, 4001, dtype="float32")[:, None]
    exact = [[v * math.erfc(-v / math.sqrt(2)) / 2] for v in x[:, 0].astype("float64")]
    for kind, (export, run) in EXPORTS.items():
        export(keras.Model(inputs, outputs), tmp_path / kind)
        received = run(tmp_path / kind, {"x": x})["gelu"]
        np.testing.assert_allclose(received, exact, rtol=1e-6, atol=2e-6)


@each_export
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_computes_in_float32(kind: str, policy: str, tmp_path: Path) -> None:
    export, run = EXPORTS[kind]
    mixed, full = adapted(lambda: functional(dtype=policy)), adapted(functional)
    for variable, value in zip(full.weights, mixed.weights, strict=True):
        variable.assign(value)
    before = [layer.dtype_policy for layer in mixed.layers]
    export(mixed, tmp_path / "model")
    assert [layer.dtype_policy for layer in mixed.layers] == before
    given = feeds({"features": (5,)}, 3, 11)
    (expected,) = predict(full, given)
    np.testing.assert_allclose(run(tmp_path / "model", given)["head"], expected, atol=1e-5)


@each_export
def test_a_file_that_answers_otherwise_is_not_written(kind: str, tmp_path: Path) -> None:
    runtime = {"onnx": onnx_file.ONNX, "litert": litert.LITERT}[kind]

    def load(data: bytes) -> conversion.Program:
        program = runtime.load(data)

        def wrong(arrays: conversion.Arrays) -> conversion.Arrays:
            return {k: v * np.float32(1.001) for k, v in program.run(arrays).items()}

        return dataclasses.replace(program, run=wrong)

    model = adapted(functional)
    before, endpoint = state(model), serve(model, None)
    broken = dataclasses.replace(runtime, load=load)
    with pytest.raises(ValueError, match="differ from the model's by {'head': 0.*above 0.0001"):
        conversion.write_converted(model, endpoint, tmp_path / "model", broken, None)
    assert state(model) == before
    assert not list(tmp_path.iterdir())


# --- What is refused ------------------------------------------------------------------------------


def computing(function: Callable[[Any], Any]) -> keras.Model:
    inputs = keras.Input((5,), name="x")
    x = layers.Lambda(function, output_shape=(7,))(layers.Dense(7, name="up")(inputs))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def strings() -> keras.Model:
    inputs = keras.Input((), dtype="string", name="text")
    x = layers.StringLookup(vocabulary=["film"], output_mode="one_hot")(inputs)
    x = layers.Dense(7, name="up")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def wide_kernel() -> keras.Model:
    inputs = keras.Input((None, 5), name="series")
    x = layers.GlobalMaxPooling1D()(layers.Conv1D(7, 11)(inputs))
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Dense(7, name="up")(x)))


# A model, options, the runtimes that refuse it, and why.
REFUSALS: dict[str, tuple[Callable[[], keras.Model], dict[str, Any], list[str], str]] = {
    "an Erfc alone": (
        lambda: computing(lambda x: tf.math.log(tf.math.erfc(x))),
        {},
        ["onnx", "litert"],
        "the operations Erfc; use other operations",
    ),
    "an Erfc with another factor": (
        lambda: computing(lambda x: 2.0 * tf.math.erfc(x) * tf.math.exp(x * x)),
        {},
        ["onnx"],
        "the operations Erfc; use other operations",
    ),
    "an operation": (
        lambda: computing(lambda x: tf.math.lgamma(tf.abs(x) + 1)),
        {},
        ["onnx"],
        "the operations Lgamma; use other operations",
    ),
    "a free length": (llama, {}, ["litert"], "StridedSlice; pass sequence_length"),
    "a free batch": (recurrent, {}, ["litert"], "TensorListReserve; pass batch_size"),
    "strings": (strings, {}, ["onnx", "litert"], "inputs that are numbers"),
    "float16": (lambda: functional(dtype="float16"), {}, ["onnx", "litert"], "3 layers of .*'up'"),
    "bfloat16": (lambda: classifier("bfloat16"), {}, ["onnx", "litert"], "dtype='float32'"),
    "a size": (functional, {"batch_size": 0}, ["litert"], "a positive integer or None"),
    "a sample it takes not": (wide_kernel, {}, ["onnx", "litert"], "pass `sample`"),
    "a sample of few": (functional, {"sample": []}, ["onnx"], r"an array for each of \['features'"),
    "NaN": (
        functional,
        {"sample": np.full((3, 5), np.nan)},
        ["onnx"],
        "finite answers.*NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    make, options, kinds, message = REFUSALS[name]
    model = adapted(make)
    before = state(model)
    for kind in kinds:
        with pytest.raises(ValueError, match=message):
            EXPORTS[kind][0](model, tmp_path / "model", **options)
        assert state(model) == before
        assert not list(tmp_path.iterdir())


@each_export
def test_an_unbuilt_model_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a built keras\.Model"):
        EXPORTS[kind][0](Unused(), tmp_path / "model")


def test_what_the_fixes_say_works(tmp_path: Path) -> None:
    unrolled = adapted(lambda: recurrent(unroll=True))
    report = kl.export_litert(unrolled, tmp_path / "unrolled", sequence_length=11)
    assert report.inputs == {"series": (None, 11, 5)}
    given = feeds({"series": (None, 5)}, 3, 13)
    for kind, (export, run) in EXPORTS.items():
        model = adapted(wide_kernel)
        export(model, tmp_path / kind, sample=given["series"])
        received = run(tmp_path / kind, given)["head"]
        np.testing.assert_allclose(received, np.array(model(given["series"])), rtol=1e-4)


@each_export
def test_weights_above_the_limit_of_the_format(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "WEIGHTS_LIMIT", 700)
    with pytest.raises(ValueError, match="bytes of weights, more than 700; export it to a Saved"):
        EXPORTS[kind][0](adapted(functional), tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "package"),
    [("onnx", "tf2onnx"), ("onnx", "onnxruntime"), ("litert", "ai_edge_litert.interpreter")],
)
def test_a_missing_package_names_its_extra(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "keras-lora\[{kind}\]"'):
        EXPORTS[kind][0](functional(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@each_export
def test_only_a_file_of_its_kind_is_overwritten(kind: str, tmp_path: Path) -> None:
    export, _ = EXPORTS[kind]
    model, file, folder = adapted(functional), tmp_path / "model", tmp_path / "folder"
    folder.mkdir()
    for path, content, message in (
        (file, b"\x89HDF, and no graph", "a file of another kind"),
        (folder, None, "a directory"),
    ):
        if content:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="overwrite=True"):
            export(model, path)
        with pytest.raises(ValueError, match=f"{message}.*remove it, or write elsewhere"):
            export(model, path, overwrite=True)
        assert not content or path.read_bytes() == content
    file.write_bytes(b"")
    export(model, file, overwrite=True)
    first = file.read_bytes()
    export(kl.unload_lora(model), file, overwrite=True)
    assert len(first) > 100
    assert file.read_bytes() != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "model"]
