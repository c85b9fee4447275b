"""Each public verb of a Keras model, and each layer around layers, on an adapted model.

The reference is a plain model of the same layers, whose kernels are `W0 + s A B` from NumPy. A verb
that is new in a later Keras fails the first tests, until somebody has decided what it must do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_lora as kl

RANK, ALPHA = 2, 3
RNG = np.random.default_rng(3)
X = RNG.normal(size=(6, 5)).astype("float32")
Y = RNG.normal(size=(6, 3)).astype("float32")
Read = Callable[[keras.Model, Path], Any]


def plain() -> keras.Model:
    keras.utils.set_random_seed(7)
    layers = [keras.layers.Dense(7, "tanh", name="up"), keras.layers.Dense(3, name="down")]
    model = keras.Sequential([keras.Input((5,)), *layers], name="mlp")
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model


def fresh() -> keras.Model:
    return kl.apply_lora(plain(), kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets=["up", "down"]))


def adapted() -> keras.Model:
    model = fresh()
    rng = np.random.default_rng(11)
    for layer in kl.lora_layers(model).values():
        for factor in layer.adapters["default"].factors:
            factor.assign(rng.normal(scale=0.3, size=factor.shape))
    return model


def reference(model: keras.Model) -> keras.Model:
    """The plain model that computes what an adapted one does."""
    wanted = plain()
    for path, layer in kl.lora_layers(model).items():
        adapter = layer.adapters["default"]
        a, b = (np.array(factor).astype("float64") for factor in adapter.factors)
        kernel = np.array(layer.base_kernel).astype("float64") + ALPHA / RANK * (a @ b)
        wanted.get_layer(path).set_weights([kernel, np.array(layer.bias)])
    return wanted


def exported(model: keras.Model, directory: Path) -> np.ndarray:
    import tensorflow as tf  # noqa: PLC0415

    model.export(directory, verbose=False)
    served = tf.saved_model.load(str(directory))
    return np.array(served.serve(X))


def stateless(model: keras.Model, _: Path) -> np.ndarray:
    return model.stateless_call(model.trainable_variables, model.non_trainable_variables, X)[0]


def stateless_loss(model: keras.Model, _: Path) -> np.ndarray:
    variables = model.trainable_variables, model.non_trainable_variables
    metrics = model.metrics_variables
    return model.stateless_compute_loss(*variables, metrics, X, Y, model(X))[0]


def written(model: keras.Model, directory: Path) -> np.ndarray:
    file = directory.with_suffix(".keras")
    model.save(file)
    return np.array(keras.saving.load_model(file)(X))


# What an adapted model gives, and the reference gives too.
EQUAL: dict[str, Read] = {
    "__call__": lambda m, _: m(X),
    "call": lambda m, _: m.call(X),
    "compute_loss": lambda m, _: m.compute_loss(X, Y, m(X)),
    "compute_output_shape": lambda m, _: m.compute_output_shape(X.shape),
    "compute_output_spec": lambda m, _: m.compute_output_spec(m.inputs[0]).shape[1:],
    "symbolic_call": lambda m, _: m.symbolic_call(m.inputs[0]).shape[1:],
    "evaluate": lambda m, _: m.evaluate(X, Y, verbose=0),
    "export": exported,
    "predict": lambda m, _: m.predict(X, verbose=0),
    "predict_on_batch": lambda m, _: m.predict_on_batch(X),
    "predict_step": lambda m, _: m.predict_step(X),
    "save": written,
    "stateless_call": stateless,
    "stateless_compute_loss": stateless_loss,
    "test_on_batch": lambda m, _: m.test_on_batch(X, Y),
    "test_step": lambda m, _: m.test_step((X, Y))["loss"],
    "get_layer": lambda m, _: m.get_layer("up")(X),
    "layers": lambda m, _: m.layers[0](X),
    "losses": lambda m, _: m.losses,
}
# What trains an adapted model: the factors move, and the base does not.
TRAINS: dict[str, Callable[[keras.Model], Any]] = {
    "fit": lambda m: m.fit(X, Y, verbose=0),
    "train_on_batch": lambda m: m.train_on_batch(X, Y),
    "train_step": lambda m: m.train_step((X, Y)),
}


def through_weights(model: keras.Model, other: keras.Model, _: Path) -> None:
    other.set_weights(model.get_weights())


def through_file(model: keras.Model, other: keras.Model, directory: Path) -> None:
    model.save_weights(directory / "m.weights.h5")
    other.load_weights(directory / "m.weights.h5")


def through_tree(model: keras.Model, other: keras.Model, _: Path) -> None:
    other.set_state_tree(model.get_state_tree())


def through_store(model: keras.Model, other: keras.Model, _: Path) -> None:
    for layer, twin in zip(model.layers, other.layers, strict=True):
        store: dict[str, Any] = {}
        layer.save_own_variables(store)
        twin.load_own_variables({key: np.array(value) for key, value in store.items()})


# What carries the values of an adapted model into another that is adapted alike.
CARRIES: dict[tuple[str, str], Callable[[keras.Model, keras.Model, Path], None]] = {
    ("get_weights", "set_weights"): through_weights,
    ("save_weights", "load_weights"): through_file,
    ("get_state_tree", "set_state_tree"): through_tree,
    ("save_own_variables", "load_own_variables"): through_store,
}


def from_json(model: keras.Model) -> keras.Model:
    return keras.models.model_from_json(model.to_json())


def from_config(model: keras.Model) -> keras.Model:
    return type(model).from_config(model.get_config())


# What makes a model of the same adapters.
MAKES: dict[tuple[str, ...], Callable[[keras.Model], keras.Model]] = {
    ("to_json",): from_json,
    ("get_config", "from_config"): from_config,
}
REFUSED: dict[str, Callable[[keras.Model], Any]] = {"quantize": lambda m: m.quantize("float8")}
# What has no values of a model, or is a part of what is tried.
OTHERS = {
    "of every variable or metric, which a test of its own compares": """variables weights
        trainable_variables trainable_weights non_trainable_variables
        non_trainable_weights metrics metrics_variables
        metrics_names count_params trainable reset_metrics get_metrics_result
        compute_metrics compiled_metrics compiled_loss loss""",
    "what `compile` was told": """compile compile_from_config get_compile_config jit_compile
        run_eagerly distribute_reduction_method distribute_strategy""",
    "what `fit`, `evaluate` and `predict` make first": """make_predict_function make_test_function
        make_train_function""",
    "what a layer is made or described by": """build build_from_config get_build_config path name
        dtype dtype_policy compute_dtype input_dtype variable_dtype input_spec supports_masking
        input output inputs outputs input_shape output_shape compute_mask""",
    "what adds to a model, which has no adapters yet": """add pop add_loss add_metric add_variable
        add_weight""",
    "quantization, which `quantize` begins": """quantization_mode quantized_build quantized_call
        get_quantization_layer_structure""",
    "test_rematerialized": "rematerialized_call",
    "test_summary": "summary",
}


def public(of: type) -> set[str]:
    return {name for name in dir(of) if not name.startswith("_")}


def test_every_verb_is_accounted_for() -> None:
    others = {name for names in OTHERS.values() for name in names.split()}
    tried = EQUAL.keys() | TRAINS.keys() | REFUSED.keys()
    tried |= {name for pair in [*CARRIES, *MAKES] for name in pair}
    assert public(keras.Sequential) <= tried | others
    assert not tried & others


@pytest.mark.parametrize("verb", EQUAL)
def test_an_adapted_model_answers_as_a_plain_one_with_its_kernels(
    verb: str, tmp_path: Path
) -> None:
    model = adapted()
    wanted = reference(model)
    found = EQUAL[verb](model, tmp_path / "adapted")
    expected = EQUAL[verb](wanted, tmp_path / "plain")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("verb", TRAINS)
def test_what_trains_moves_the_factors_along_the_gradient_of_the_kernel(verb: str) -> None:
    """With `SGD`: `dA = s G B^T` and `dB = s A^T G`, with the gradient `G` of the plain kernel."""
    model = adapted()
    wanted, layers = reference(model), kl.lora_layers(model)
    before = {
        path: list(map(np.array, x.adapters["default"].factors)) for path, x in layers.items()
    }
    base = {path: np.array(layer.base_kernel) for path, layer in layers.items()}
    kernels = {path: np.array(wanted.get_layer(path).kernel) for path in layers}
    TRAINS[verb](model)
    TRAINS[verb](wanted)
    for path, layer in layers.items():
        step = (np.array(wanted.get_layer(path).kernel) - kernels[path]).astype("float64")
        a, b = before[path]
        moved = [a + ALPHA / RANK * step @ b.T, b + ALPHA / RANK * a.T @ step]
        for found, expected in zip(layer.adapters["default"].factors, moved, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(layer.base_kernel, base[path])


@pytest.mark.parametrize("verbs", CARRIES)
def test_what_carries_values_carries_all(verbs: tuple[str, str], tmp_path: Path) -> None:
    model, other = adapted(), fresh()
    for layer in kl.lora_layers(other).values():
        for value in (layer.base_kernel, layer.bias):
            value.assign(np.ones(value.shape))
    CARRIES[verbs](model, other, tmp_path)
    np.testing.assert_array_equal(np.array(other(X)), np.array(model(X)))


@pytest.mark.parametrize("verbs", MAKES)
def test_what_makes_a_model_makes_its_adapters(verbs: tuple[str, ...]) -> None:
    model = adapted()
    made = MAKES[verbs](model)
    assert kl.lora_layers(made).keys() == kl.lora_layers(model).keys()
    made.set_weights(model.get_weights())
    np.testing.assert_array_equal(np.array(made(X)), np.array(model(X)))


@pytest.mark.parametrize("verb", REFUSED)
def test_what_cannot_be_right_is_refused_and_changes_nothing(verb: str) -> None:
    model = adapted()
    before = np.array(model(X))
    with pytest.raises(ValueError, match="merge_lora"):
        REFUSED[verb](model)
    np.testing.assert_array_equal(np.array(model(X)), before)


def archived(model: keras.Model, directory: Path) -> np.ndarray:
    import tensorflow as tf  # noqa: PLC0415

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", model.call, [keras.InputSpec(shape=X.shape, dtype="float32")])
    archive.write_out(directory, verbose=False)
    served = tf.saved_model.load(str(directory))
    return np.array(served.serve(X))


def by_functions(model: keras.Model, directory: Path) -> np.ndarray:
    file = directory.with_suffix(".weights.h5")
    keras.saving.save_weights(model, file)
    other = fresh() if kl.lora_layers(model) else plain()
    keras.saving.load_weights(other, file)
    return np.array(other(X))


FUNCTIONS: dict[tuple[str, ...], Read] = {
    ("ExportArchive",): archived,
    ("save_weights", "load_weights"): by_functions,
}
NO_VALUES = {
    "test_keras_savers": "save_model load_model clone_model model_from_json",
    "it edits the arrays of a file": "KerasFileEditor",
    "of names, classes and configs": """CustomObjectScope custom_object_scope get_custom_objects
        get_registered_name get_registered_object register_keras_serializable
        deserialize_keras_object serialize_keras_object Model Sequential""",
}


def test_every_function_that_saves_is_accounted_for() -> None:
    modules = (keras.saving, keras.models, keras.export)
    found = {name for module in modules for name, x in vars(module).items() if callable(x)}
    tried = {name for names in FUNCTIONS for name in names}
    others = {name for names in NO_VALUES.values() for name in names.split()}
    assert {name for name in found if not name.startswith("_")} <= tried | others


@pytest.mark.parametrize("names", FUNCTIONS)
def test_what_a_function_saves_answers_as_the_plain_model_does(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    model = adapted()
    expected = FUNCTIONS[names](reference(model), tmp_path / "plain")
    found = FUNCTIONS[names](model, tmp_path / "adapted")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def dense() -> keras.layers.Layer:
    return keras.layers.Dense(7, name="inner")


# A layer around others: the input, and the layer.
WRAPPERS: dict[str, tuple[tuple[int, ...], Callable[[], keras.layers.Layer]]] = {
    "TimeDistributed": ((11, 5), lambda: keras.layers.TimeDistributed(dense())),
    "Pipeline": ((5,), lambda: keras.layers.Pipeline([dense()])),
}
NO_WRAPPER = {
    "Bidirectional": "around cells, whose kernels are adapted by no preset",
    "RNN": "around a cell",
    "StackedRNNCells": "around cells",
    "Wrapper": "the base class, which has no call",
    "SpectralNormalization": "it assigns the kernel: test_trained_beside",
    "RandomApply": "it is random in training alone",
}


def test_every_layer_around_layers_is_accounted_for() -> None:
    found = {
        name
        for name, layer in vars(keras.layers).items()
        if isinstance(layer, type)
        and {"layer", "layers", "cell", "cells"} & inspect.signature(layer).parameters.keys()
    }
    assert found <= WRAPPERS.keys() | NO_WRAPPER.keys()


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_layer_within_another_is_adapted(name: str) -> None:
    shape, make = WRAPPERS[name]
    model = keras.Sequential([keras.Input(shape), make()])
    x = RNG.normal(size=(2, *shape)).astype("float32")
    inner = next(v for v in model._flatten_layers() if v.name == "inner")
    kernel, bias = map(np.array, inner.get_weights())
    kl.apply_lora(model, kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets=["inner"]))
    (layer,) = kl.lora_layers(model).values()
    a, b = layer.adapters["default"].factors
    b.assign(RNG.normal(size=b.shape))
    expected = x @ (kernel + ALPHA / RANK * np.array(a) @ np.array(b)) + bias
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    kl.unload_lora(model)
    np.testing.assert_array_equal(inner.get_weights()[0], kernel)
