"""What `check_saved_model` refuses, in the graph and within functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text
from tensorflow.core.framework import op_def_pb2
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.client import pywrap_tf_session

import keras_lora as kl

SPEC = tf.TensorSpec([None, 5], tf.float32, "x")


def save(path: Path, call: Callable[[Any], Any], spec: tf.TensorSpec = SPEC) -> Path:
    module = tf.Module()
    signature = tf.function(call).get_concrete_function(spec)
    tf.saved_model.save(module, str(path), {"serving_default": signature})
    return path


def in_a_loop(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The operation is in a function that the body of a loop calls."""
    inner = tf.function(call)

    def outer(x: Any) -> Any:
        _, y = tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, inner(y)), (0, x))
        return {"y": y}

    return outer


def python(x: Any) -> Any:
    return tf.ensure_shape(tf.py_function(lambda v: v + 1, [x], tf.float32), x.shape)


def numpy_python(x: Any) -> Any:
    return tf.ensure_shape(tf.numpy_function(np.tanh, [x], tf.float32), x.shape)


CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "eager Python": (in_a_loop(python), "operation EagerPyFunc, which runs Python"),
    "NumPy": (in_a_loop(numpy_python), "operation PyFunc, which runs Python"),
    "compiled": (in_a_loop(tf.function(tf.tanh, jit_compile=True)), "jit_compile=True"),
    "half": (lambda x: {"y": tf.cast(x, tf.float16)}, "DT_HALF, which has no JSON form"),
    "unsigned": (lambda x: {"y": tf.cast(x, tf.uint16)}, "DT_UINT16, which has no JSON form"),
    "complex": (lambda x: {"y": tf.cast(x, tf.complex64)}, "DT_COMPLEX64, which has no JSON form"),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_what_a_server_cannot_run_is_found_wherever_it_is(name: str, tmp_path: Path) -> None:
    call, text = CALLS[name]
    (problem,) = kl.check_saved_model(save(tmp_path, call)).problems
    assert text in problem


def test_the_type_of_an_input_is_checked_too(tmp_path: Path) -> None:
    spec = tf.TensorSpec([None], tf.bfloat16, "x")
    save(tmp_path, lambda x: {"y": tf.cast(x, tf.float32)}, spec)
    (problem,) = kl.check_saved_model(tmp_path).problems
    assert problem.startswith("the input 'x' of 'serving_default' of type DT_BFLOAT16")


def rename_operation(meta: Any) -> None:
    nodes = (node for f in meta.graph_def.library.function for node in f.node_def)
    next(node for node in nodes if node.op == "Tanh").op = "MyTanh"


def call_by_name(meta: Any) -> None:
    """Add a call of a function in TensorFlow 1's way: an operation of its name."""
    node = meta.graph_def.node.add(name="call")
    node.op = meta.graph_def.library.function[0].signature.name


def forget_signatures(meta: Any) -> None:
    del meta.signature_def["serving_default"]


def make_sparse(meta: Any) -> None:
    info = meta.signature_def["serving_default"].inputs["x"]
    info.coo_sparse.values_tensor_name = info.name


def retag(meta: Any) -> None:
    meta.meta_info_def.tags[:] = ["train"]


EDITS: dict[str, tuple[Callable[[Any], None], list[str]]] = {
    "nothing": (lambda meta: None, []),
    "unknown operation": (rename_operation, ["operation MyTanh, which TensorFlow does not have"]),
    "called by name": (call_by_name, []),
    "no signature": (forget_signatures, ["no signature"]),
    "sparse": (make_sparse, ["the input 'x' of 'serving_default', which is sparse"]),
    "other tag": (retag, ["no graph with the tag 'serve'"]),
}


@pytest.mark.parametrize("name", list(EDITS))
def test_what_a_server_cannot_load_or_call_is_found(name: str, tmp_path: Path) -> None:
    edit, texts = EDITS[name]
    file = save(tmp_path, lambda x: {"y": tf.tanh(x)}) / "saved_model.pb"
    graph = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    edit(graph.meta_graphs[0])
    file.write_bytes(graph.SerializeToString())
    problems = kl.check_saved_model(tmp_path).problems
    assert len(problems) == len(texts)
    for problem, text in zip(problems, texts, strict=True):
        assert text in problem


def test_every_json_type_passes(tmp_path: Path) -> None:
    names = [
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint32",
        "uint64",
        "bool",
    ]
    save(tmp_path, lambda x: {name: tf.cast(x, name) for name in names})
    assert not kl.check_saved_model(tmp_path).problems
    save(tmp_path, lambda x: {"y": tf.strings.as_string(x)})
    assert not kl.check_saved_model(tmp_path).problems


@pytest.mark.slow
def test_generate_as_keras_traces_it_is_refused(tmp_path: Path) -> None:
    """`export_saved_model` replaces an operation; see `export/keras_hub/operations.py`."""
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=31,
        num_layers=2,
        num_heads=3,
        hidden_dim=15,
        intermediate_dim=17,
        max_sequence_length=13,
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)

    def generate(token_ids: Any) -> Any:
        padding_mask = tf.ones_like(token_ids, tf.bool)
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        return {"token_ids": model.generate_step(inputs)["token_ids"]}

    model.compile(sampler="greedy")
    module = tf.Module()
    module.weights = model.weights
    signature = tf.function(generate).get_concrete_function(tf.TensorSpec([None, 13], tf.int32))
    tf.saved_model.save(module, str(tmp_path), {"serving_default": signature})
    (problem,) = kl.check_saved_model(tmp_path).problems
    assert "operation XlaDynamicUpdateSlice, which needs XLA" in problem
    assert "keras.ops.slice_update" in problem


def test_every_operation_of_tensorflow_text_is_known_as_one(tmp_path: Path) -> None:
    """A node of each kind, beside those of a graph that passes."""
    file = save(tmp_path, lambda x: {"y": tf.tanh(x)}) / "saved_model.pb"
    graph = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    names = set()
    for library in Path(tensorflow_text.__file__).parent.glob("python/*/*.so"):
        handle = pywrap_tf_session.TF_LoadLibrary(str(library))
        operations = op_def_pb2.OpList.FromString(pywrap_tf_session.TF_GetOpList(handle))
        names |= {operation.name for operation in operations.op}
    for name in names:
        graph.meta_graphs[0].graph_def.node.add(name=name, op=name)
    file.write_bytes(graph.SerializeToString())
    report = kl.check_saved_model(tmp_path)
    assert set(report.text_operations) == names
    assert len(names) > 30
    assert not report.problems
