"""A layer whose activations are not kept: the backward pass computes them again.

    y = f(x; W, s)        kept for the backward pass: x and s

`s` is the state with which the first pass began, of random seeds above all. The second pass begins
with the same state and changes none, so it drops what the first pass dropped. Keras's own
`RematScope` acts only on layers that are made in it, and draws other seeds in the second pass.

Private API in this file, and why (`tests/test_private_api.py` watches each):
    `_remat_mode`: Keras asks `rematerialized_call`, a public method, only where this is set, and
        sets it in the constructor alone.
    `could_possibly_record` of TensorFlow: nothing public tells whether a tape records, and a graph
        that is not differentiated, such as a SavedModel's, needs nothing to be computed again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
from keras import ops

from keras_lora.layers.computation import all_chosen, computing
from keras_lora.lowrank.equations import Tensor

_METHOD = "rematerialized_call"


def recompute(layer: keras.layers.Layer) -> None:
    """Let a layer compute its activations again in the backward pass. Class and config stay."""
    layer.__dict__[_METHOD] = _Recomputation(layer)
    layer.__dict__["_remat_mode"] = layer.__dict__[_METHOD]


def keep_activations(layer: keras.layers.Layer) -> None:
    """The inverse of `recompute`: the layer keeps its activations again."""
    layer.__dict__["_remat_mode"] = layer.__dict__.pop(_METHOD).mode


def is_recomputed(layer: keras.layers.Layer) -> bool:
    """Whether `recompute` was called for a layer."""
    return isinstance(vars(layer).get(_METHOD), _Recomputation)


class _Recomputation:
    """In the place of a layer's `rematerialized_call`.

    Attributes:
        mode: What Keras knew of the layer before.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.mode = layer._remat_mode
        self._layer = layer

    def __call__(self, layer_call: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        return partial(self._called, layer_call) if _may_be_differentiated() else layer_call

    def _called(self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = _Call(self._layer, layer_call, args, kwargs)
        # From integers alone nothing is computed again: TensorFlow needs a float to wait for.
        return call.outputs() if call.floats else layer_call(*args, **kwargs)


def _may_be_differentiated() -> bool:
    backend = keras.backend.backend()
    if backend == "tensorflow":
        record = importlib.import_module("tensorflow.python.eager.record")
        return bool(record.could_possibly_record())
    if backend == "torch":
        return bool(importlib.import_module("torch").is_grad_enabled())
    return True  # on JAX it costs nothing where nothing is differentiated


class _Call:
    """One call of a layer, which is computed in the first pass and again in the second.

    Args:
        layer: The layer.
        layer_call: Its `call`, or its `quantized_call`.
        args: Arguments of the call.
        kwargs: Arguments of the call, by name.

    Attributes:
        floats: The arguments that have gradients, by their index among all values.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        layer_call: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._layer, self._layer_call = layer, layer_call
        self._arguments = (list(args), dict(kwargs))
        self._leaves = keras.tree.flatten(self._arguments)
        self.floats = {i: x for i, x in enumerate(self._leaves) if _is_float(x)}
        self._masks = {i: _mask_of(x) for i, x in self.floats.items()}
        self._chosen = all_chosen()
        self._first: _Scope | None = None
        self._form: _Form
        self._aside: Sequence[Tensor] = ()

    def outputs(self) -> Any:
        """The layer's outputs; its state and its losses are then what the call makes of them."""
        floats, others = self._computed()
        form, scope = self._form, self._first
        assert scope is not None
        for loss in floats[len(form.floats) :]:
            self._layer.add_loss(loss)
        for variable, value in zip(scope.moved, others[form.other_count :], strict=True):
            variable.assign(value)
        return form.packed(floats, others)

    def _computed(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The results that have gradients, and the others.

        TensorFlow takes only such for arguments and results of what is computed again.
        """
        if keras.backend.backend() != "tensorflow":
            results: Any = keras.remat(self._pass)(*self.floats.values())
            return results
        return keras.remat(lambda *xs: self._pass(*xs)[0])(*self.floats.values()), self._aside

    def _pass(self, *floats: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        leaves = list(self._leaves)
        for index, x in zip(self.floats, floats, strict=True):
            leaves[index] = _marked(x, self._masks[index])
        args, kwargs = keras.tree.pack_sequence_as(self._arguments, leaves)
        first = self._first is None
        scope = _Scope(self._layer, self._first)
        with computing(self._chosen), scope:
            outputs = scope.called(partial(self._layer_call, *args, **kwargs))
            form, results, others = _taken_apart(outputs)
            others += [variable.value for variable in scope.moved]
        if first:
            self._first, self._form, self._aside = scope, form, others
        return results + scope.losses, others


class _Scope(keras.StatelessScope):
    """Within it no variable changes, and all begin with the values that they had in the first pass.

    Args:
        layer: The layer.
        first: The scope of the first pass; None in the first.

    Attributes:
        before: The variables that the layer assigned to, and their values before that.
        moved: The variables that the layer assigned to.
        outer: The scope around the first pass, which on JAX has the values of all variables.
        training: Whether the layer was called in training.
    """

    def __init__(self, layer: keras.layers.Layer, first: _Scope | None) -> None:
        before = [] if first is None else first.before
        super().__init__(before, collect_losses=True, initialize_variables=False)
        self._layer, self._first = layer, first
        self.before: list[tuple[keras.Variable, Tensor]] = list(before)
        self.outer: Any = None
        self.training: bool | None = None

    @property
    def moved(self) -> list[keras.Variable]:
        return [variable for variable, _ in self.before]

    def __enter__(self) -> _Scope:
        super().__enter__()
        self.outer = self.original_scope if self._first is None else self._first.outer
        return self

    def called(self, call: Callable[[], Any]) -> Any:
        """What a call returns, in the context that Keras gave the layer in the first pass."""
        context = _Context(self._layer, call)
        given = {} if self._first is None else {"training": self._first.training}
        outputs = context(**given)
        self.training = context.training
        return outputs

    def get_current_value(self, variable: keras.Variable) -> Any:
        value = super().get_current_value(variable)
        outer = self.outer
        return outer.get_current_value(variable) if value is None and outer else value

    def add_update(self, update: tuple[keras.Variable, Tensor]) -> None:
        variable, _ = update
        if all(variable is not known for known in self.moved):
            if any(variable is weight for weight in self._layer.weights):
                raise moves(self._layer.name, ["layers"], [variable.path])
            # A copy: the value is the variable itself on TensorFlow, and its memory on torch.
            self.before.append((variable, ops.copy(variable.value)))
        super().add_update(update)


def moves(block: str, assigning: Sequence[str], weights: Sequence[str]) -> ValueError:
    """The refusal of a block with layers that assign to weights while they compute."""
    return ValueError(
        "Expected blocks that can be computed twice in a step. Received: the block "
        f"'{block}', in which {list(assigning)} assign to {sorted(weights)} in training. Freeze "
        "these layers (`layer.trainable = False` keeps a BatchNormalization still), or "
        "rematerialize blocks without them: rematerialize(model, blocks=[...])."
    )


class _Context(keras.layers.Layer):
    """A call with what Keras tells the layers in a layer: `training`, and the dtype to compute in.

    The second pass is outside of all layers.
    """

    def __init__(self, layer: keras.layers.Layer, call: Callable[[], Any]) -> None:
        mixed = layer.compute_dtype != layer.variable_dtype
        dtype = f"mixed_{layer.compute_dtype}" if mixed else layer.compute_dtype
        super().__init__(name=layer.name, dtype=dtype, autocast=layer.autocast)
        self.training: bool | None = None
        self._call = call

    def call(self, training: bool | None = None) -> Any:
        self.training = training
        return self._call()


class _Form:
    """The structure of a layer's outputs, without their tensors.

    Attributes:
        floats: The indices of the outputs that have gradients.
        other_count: The number of other tensors: integers, and masks of the outputs.
    """

    def __init__(self, outputs: Any, leaves: Sequence[Any], masks: Mapping[int, Tensor]) -> None:
        tensors = [i for i, x in enumerate(leaves) if ops.is_tensor(x)]
        self.floats = [i for i in tensors if _is_float(leaves[i])]
        self._others = [i for i in tensors if i not in self.floats]
        self._masked = list(masks)
        self._values = [None if i in tensors else x for i, x in enumerate(leaves)]
        self._structure = keras.tree.map_structure(lambda _: None, outputs)
        self.other_count = len(self._others) + len(self._masked)

    def packed(self, floats: Sequence[Tensor], others: Sequence[Tensor]) -> Any:
        """The outputs, with these tensors."""
        leaves = list(self._values)
        for index, x in zip(self.floats, floats, strict=False):
            leaves[index] = x
        for index, x in zip(self._others, others, strict=False):
            leaves[index] = x
        for index, mask in zip(self._masked, others[len(self._others) :], strict=False):
            leaves[index] = _marked(leaves[index], mask)
        return keras.tree.pack_sequence_as(self._structure, leaves)


def _taken_apart(outputs: Any) -> tuple[_Form, list[Tensor], list[Tensor]]:
    """The form of a layer's outputs, those that have gradients, and the other tensors."""
    leaves = keras.tree.flatten(outputs)
    masks = {i: m for i, x in enumerate(leaves) if (m := _mask_of(x)) is not None}
    form = _Form(outputs, leaves, masks)
    others = [x for i, x in enumerate(leaves) if ops.is_tensor(x) and i not in form.floats]
    return form, [leaves[i] for i in form.floats], [*others, *masks.values()]


def _is_float(value: Any) -> bool:
    dtype = keras.backend.standardize_dtype(value.dtype) if ops.is_tensor(value) else ""
    return bool(dtype) and keras.backend.is_float_dtype(dtype)


class _Mask(keras.layers.Layer):
    """Reads and writes the mask that Keras keeps with a tensor."""

    def __init__(self) -> None:
        super().__init__(name="mask", autocast=False)
        self.supports_masking = True
        self.mask: Tensor | None = None

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        self.mask = mask
        return inputs


def _mask_of(value: Any) -> Tensor | None:
    if not ops.is_tensor(value):
        return None
    layer = _Mask()
    layer(value)
    return layer.mask


def _marked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else _Mask()(x, mask=mask)
