"""What only TensorFlow has: strategies, `generate`, and the gradients that are not formed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from support import quantized
from support.cases import ALPHA, BY_ID, RANK, adapted, adapter, numpy_of, reference_dora
from support.models import composite, data, functional, randomize_adapters
from support.replicas import mirrored

import keras_lora as kl
from keras_lora.layers import site_of

CONFIG = kl.LoRAConfig(rank=2, alpha=3)


@pytest.mark.parametrize("use_dora", [False, True])
def test_float64_base_merges_in_float64(use_dora: bool) -> None:
    model = BY_ID["dense"].model(dtype="float64")
    w0 = numpy_of(model.get_layer("case").kernel)
    adapted(BY_ID["dense"], model, use_dora=use_dora)
    a, b, *m = map(numpy_of, adapter(model).factors)
    expected = w0 + ALPHA / RANK * a @ b
    if use_dora:
        expected = reference_dora(BY_ID["dense"], expected, *m)
    merged = numpy_of(kl.merge_lora(model).get_layer("case").kernel)
    np.testing.assert_allclose(merged, expected, rtol=1e-13)


@pytest.fixture(scope="module")
def strategy() -> Any:
    return mirrored(2)


@pytest.mark.parametrize(
    ("compiled_first", "use_dora"), [(False, False), (True, False), (False, True)]
)
def test_a_model_made_under_a_strategy(strategy: Any, compiled_first: bool, use_dora: bool) -> None:
    with strategy.scope():
        model = functional()
        if compiled_first:
            model.compile("adam", "mse")
    x, y = data(model)
    if compiled_first:
        model.fit(x, y, batch_size=2, verbose=0)
    options = dataclasses.replace(CONFIG, use_dora=use_dora)
    kl.apply_lora(model, options)  # outside the scope, on purpose
    mirrored = type(model.get_layer("up").base_kernel.value)
    assert all(isinstance(v.value, mirrored) for v in model.trainable_variables)
    if not compiled_first:
        with strategy.scope():
            model.compile("adam", "mse")
    frozen = [numpy_of(v) for v in model.non_trainable_variables]
    start = [numpy_of(v) for v in model.trainable_variables]
    model.fit(x, y, batch_size=2, verbose=0)
    for variable, value in zip(model.non_trainable_variables, frozen, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), value)
    assert all(
        (numpy_of(v) != s).any() for v, s in zip(model.trainable_variables, start, strict=True)
    )
    expected = model.predict(x, verbose=0)
    kl.merge_lora(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)


def causal_lm() -> keras.Model:
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=31,
        num_layers=2,
        num_heads=3,
        hidden_dim=15,
        intermediate_dim=17,
        max_sequence_length=13,
    )
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


def test_generate_follows_every_change() -> None:
    model = causal_lm()
    model.compile(sampler="greedy")
    prompt = {
        "token_ids": np.array([[3, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]),
    }

    def generate() -> list[int]:
        return list(model.generate(prompt, stop_token_ids=None)["token_ids"][0])

    base = generate()
    kl.apply_lora(model, kl.LoRAConfig(rank=2, alpha=64))
    assert generate() == base
    randomize_adapters(model)
    moved = generate()
    assert moved != base
    with kl.disable_adapter(model):
        assert generate() == base
    kl.merge_lora(model)
    assert generate() == moved


def test_switching_does_not_trace_generate_again() -> None:
    model = causal_lm()
    model.compile(sampler="greedy")
    for name, rank in [("one", 2), ("two", 3), ("three", 1)]:
        kl.apply_lora(model, kl.LoRAConfig(rank=rank, alpha=64), name=name)
    randomize_adapters(model)
    prompt = {
        "token_ids": np.array([[3, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]),
    }
    texts: dict[str, set[tuple[int, ...]]] = {"one": set(), "two": set(), "three": set()}
    kl.set_adapter(model, "two")
    model.generate(prompt, stop_token_ids=None)
    function = model.generate_function
    for name in ["one", "two", "three", "one", "two", "three"]:
        kl.set_adapter(model, name)
        tokens = model.generate(prompt, stop_token_ids=None)["token_ids"][0]
        texts[name].add(tuple(map(int, tokens)))
    assert model.generate_function is function
    assert function.experimental_get_tracing_count() == 1
    assert {len(seen) for seen in texts.values()} == {1}
    assert len({seen.pop() for seen in texts.values()}) == 3


def test_a_kerashub_task_round_trips_through_a_copy() -> None:
    model = causal_lm()
    inputs = {"token_ids": np.ones((2, 11), "int32"), "padding_mask": np.ones((2, 11), "int32")}
    expected = numpy_of(model(inputs))
    copy = kl.apply_lora(model, CONFIG, inplace=False)
    np.testing.assert_allclose(numpy_of(copy(inputs)), expected, rtol=1e-5, atol=1e-6)
    assert not kl.lora_layers(model)
    with pytest.raises(ValueError, match=r"merge_lora\(model, inplace=False\)"):
        copy.save_to_preset("nowhere")
    with pytest.raises(ValueError, match=r"merge_lora\(model, inplace=False\)"):
        copy.backbone.save_to_preset("nowhere")


VIEWS = {"ReadVariableOp", "Identity", "StopGradient", "Reshape"}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("make", [functional, composite])
def test_the_gradient_of_a_frozen_kernel_is_not_in_the_training_graph(
    make: Any, use_dora: bool
) -> None:
    """In a training step, only operations that read a frozen kernel have its shape."""
    model = kl.apply_lora(make(), kl.LoRAConfig(rank=2, alpha=3, use_dora=use_dora))
    x, _ = data(model, 13)  # a size that no kernel has

    @tf.function
    def step(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    graph = step.get_concrete_function(tf.TensorSpec(x.shape, tf.float32)).graph
    needed, waiting = set(), [tensor.op for tensor in graph.outputs]
    while waiting:
        operation = waiting.pop()
        if operation.name not in needed:
            needed.add(operation.name)
            waiting += [t.op for t in operation.inputs]
    layers = kl.lora_layers(model).values()
    kernels = {tuple(layer.base_kernel.shape) for layer in layers}
    matrices = {site_of(x).split().matrix_shape(tuple(x.base_kernel.shape)) for x in layers}
    forms = kernels | matrices | {(1, *matrix) for matrix in matrices}
    operations = [graph.get_operation_by_name(name) for name in needed]
    assert {"MatMul"} <= {operation.type for operation in operations}
    formed = {o.type for o in operations if o.outputs and tuple(o.outputs[0].shape) in forms}
    assert "ReadVariableOp" in formed
    assert formed <= VIEWS


def test_sparse_inputs_with_dropout() -> None:
    inputs = keras.Input((5,), sparse=True)
    hidden = keras.layers.Dense(7, name="up")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    kl.apply_lora(model, kl.LoRAConfig(rank=2, dropout=0.5))
    dense = np.eye(5, dtype="float32")[:3]
    sparse = tf.sparse.from_dense(dense)
    answers = []
    for x in (sparse, dense):
        keras.utils.set_random_seed(3)
        (layer,) = kl.lora_layers(model).values()
        assert layer.bank.seeds is not None
        layer.bank.seeds.state.assign([1, 0])
        layer.slots[0].b.assign(np.ones((2, 7)))
        answers.append(np.array(model(x, training=True)))
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-6, atol=1e-6)


def test_tensorflow_saves_what_an_adapted_model_computes(tmp_path: Path) -> None:
    model = functional()
    kl.apply_lora(model, kl.LoRAConfig(rank=2, dropout=0.1, use_dora=True))
    randomize_adapters(model)
    x = data(model)[0]
    expected = np.array(kl.merge_lora(model, inplace=False)(x))
    tf.saved_model.save(model, str(tmp_path / "model"))
    served = tf.saved_model.load(tmp_path / "model").signatures["serving_default"]
    (answer,) = served(inputs=tf.constant(x)).values()
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", quantized.GRIDS)
def test_no_quantized_matrix_is_in_floating_point_before_it_is_needed(grid: str) -> None:
    layers = [keras.layers.Dense(width, name=name) for name, width in (("up", 13), ("down", 7))]
    model = keras.Sequential([keras.Input((11,)), *layers])
    for layer in layers:
        quantized.GRIDS[grid](layer)
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up", "down"]))

    @tf.function(input_signature=[tf.TensorSpec((3, 11))], autograph=False)
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(model(x, training=True) ** 2)
        return tape.gradient(y, model.trainable_variables)

    graph = step.get_concrete_function().graph
    after, matrices = {graph.inputs[0].op.name}, []
    for op in graph.get_operations():
        sources = [*(tensor.op for tensor in op.inputs), *op.control_inputs]
        if any(source.name in after for source in sources):
            after.add(op.name)
        shapes = [sorted(t.shape) for t in op.outputs if t.dtype.is_floating and t.shape.rank == 2]
        if [11, 13] in shapes or [7, 13] in shapes:
            matrices.append(op.name)
    assert matrices
    assert set(matrices) <= after
