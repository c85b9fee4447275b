"""The shapes of what a training step computes, on each backend."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import keras


def shapes_of_a_step(model: keras.Model, x: Any, y: Any) -> Iterator[tuple[int, ...]]:
    """The shape of every tensor that a training step computes, in each pass."""
    if keras.backend.backend() == "tensorflow":
        yield from _on_tensorflow(model, x, y)
    elif keras.backend.backend() == "jax":
        yield from _on_jax(model, x, y)
    else:
        yield from _on_torch(model, x, y)


def graph_of_a_step(model: keras.Model, x: Any, y: Any) -> Any:
    """TensorFlow's graph of a training step."""
    tf = importlib.import_module("tensorflow")
    step = tf.function(model.train_step).get_concrete_function((tf.constant(x), tf.constant(y)))
    return step.graph


def operations_before(operation: Any) -> set[Any]:
    """The operations of TensorFlow's graph that come before one."""
    found: set[Any] = set()
    left = [operation]
    while left:
        op = left.pop()
        new = {*(x.op for x in op.inputs), *op.control_inputs} - found
        found |= new
        left += new
    return found


def _on_tensorflow(model: keras.Model, x: Any, y: Any) -> Iterator[tuple[int, ...]]:
    definition = graph_of_a_step(model, x, y).as_graph_def(add_shapes=True)
    for nodes in (definition.node, *(f.node_def for f in definition.library.function)):
        for node in nodes:
            for shape in node.attr["_output_shapes"].list.shape:
                yield tuple(dim.size for dim in shape.dim)


def jax_state(model: keras.Model, x: Any, y: Any) -> Any:
    """What `train_step` takes on JAX beside a batch; optimizer and metrics are built."""
    model._symbolic_build(data_batch=(x, y))
    return model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )


def _on_jax(model: keras.Model, x: Any, y: Any) -> Iterator[tuple[int, ...]]:
    jax, extended = map(importlib.import_module, ("jax", "jax.extend.core"))
    left = [jax.make_jaxpr(model.train_step)(jax_state(model, x, y), (x, y)).jaxpr]
    while left:
        jaxpr = left.pop()
        for equation in jaxpr.eqns:
            yield from (tuple(v.aval.shape) for v in equation.outvars)
            left += extended.jaxprs_in_params(equation.params)


def _on_torch(model: keras.Model, x: Any, y: Any) -> Iterator[tuple[int, ...]]:
    torch = importlib.import_module("torch")
    mode = importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode
    shapes: list[tuple[int, ...]] = []

    class Recorded(mode):  # type: ignore[misc, valid-type]
        def __torch_dispatch__(
            self, function: Any, _: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            found = result if isinstance(result, list | tuple) else [result]
            shapes.extend(tuple(x.shape) for x in found if isinstance(x, torch.Tensor))
            return result

    with Recorded():
        model.train_on_batch(x, y)
    yield from shapes
