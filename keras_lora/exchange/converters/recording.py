"""Running a converter of KerasHub without a checkpoint, to record which weight goes where.

Private Keras API in this file, and why (`tests/test_private_quantizing.py` watches it):
    `_shape`: a variable that stands for a matrix of any size without its memory.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras

from keras_lora.exchange.converters.converters import Converter, MissingFieldError
from keras_lora.exchange.converters.tensors import Traced, Weight
from keras_lora.layers import Site, sites_of
from keras_lora.walker import lora_layers, walk


@dataclass
class Recording:
    """The values that a converter assigns to variables.

    Attributes:
        values: The value of each variable, by the variable's `id`: a `Traced`, or a value that
            the converter computed without numpy.
        stopped: Why the converter did not run to its end, or None.
    """

    values: dict[int, Any] = field(default_factory=dict)
    stopped: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Assumptions about a checkpoint: endings of names that are absent, axes of its tensors."""

    absent: tuple[str, ...]
    axes: int = 0


# Only files from TensorFlow's BERT have these names; modules of torch have others.
_TENSORFLOW = "LayerNorm.gamma", "LayerNorm.beta"
# A converter that stops with one assumption may finish with another: Gemma 3n's asks whether a
# norm is a batch norm, and GPT-OSS's asks for the four lengths of its packed experts.
_CHECKPOINTS = [
    Checkpoint(_TENSORFLOW),
    Checkpoint((*_TENSORFLOW, "running_mean")),
    Checkpoint(_TENSORFLOW, axes=4),
]


class RecordingLoader:
    """Stands for KerasHub's `SafetensorLoader`, and has every weight without its values.

    Converters ask for some names only to see whether a file has them. `Checkpoint.absent` has the
    endings of names that are answered with a `KeyError`.
    """

    preset = None
    prefix = ""
    safetensor_config = None

    def __init__(self, recording: Recording, checkpoint: Checkpoint) -> None:
        self.recording = recording
        self.checkpoint = checkpoint

    def get_tensor(self, hf_weight_key: str) -> Traced:
        if hf_weight_key.endswith(self.checkpoint.absent):
            raise KeyError(hf_weight_key)
        return Weight(hf_weight_key, axes=self.checkpoint.axes)

    def port_weight(
        self,
        keras_variable: Any,
        hf_weight_key: str,
        hook_fn: Callable[[Any, list[int]], Any] | None = None,
    ) -> None:
        value: Any = self.get_tensor(hf_weight_key)
        if hook_fn is not None:
            value = hook_fn(value, list(keras_variable.shape))
        if isinstance(keras_variable, keras.Variable):  # with Keras's own LoRA it is a sum
            self.recording.values[id(keras_variable)] = value


def record(model: keras.Model, backbone: keras.Model, converter: Converter) -> Recording:
    """Run a converter on a model, without changing the model's variables."""
    best = Recording()
    for checkpoint in _CHECKPOINTS:
        recording = _recorded(model, backbone, converter, checkpoint)
        if len(recording.values) > len(best.values):
            best = recording
        if recording.stopped is None:
            break
    return best


def _recorded(
    model: keras.Model, backbone: keras.Model, converter: Converter, checkpoint: Checkpoint
) -> Recording:
    recording = Recording()
    loader = RecordingLoader(recording, checkpoint)
    with caught_assignments(model, recording), silenced():
        recording.stopped = _run(converter.module.convert_weights, backbone, loader, converter)
        convert_head = getattr(converter.module, "convert_head", None)
        if convert_head is not None and model is not backbone:
            # A converter has the head of one kind of task, and stops at once at other tasks.
            _run(convert_head, model, loader, converter)
    return recording


def _run(
    convert: Callable[..., Any], model: keras.Model, loader: RecordingLoader, converter: Converter
) -> str | None:
    """Why the converter stopped before its end, or None. What it assigned before is recorded."""
    try:
        convert(model, loader, converter.config)
    except MissingFieldError:
        raise
    except Exception as error:  # whatever the converter raises where it needs values
        return f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Within the context converters write no notes or warnings of weights that are missing."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def caught_assignments(model: keras.Model, recording: Recording) -> Iterator[None]:
    """Within the context an assignment to a variable of a model is recorded, and not done."""

    def catch(variable: keras.Variable) -> Callable[[Any], Any]:
        def assign(value: Any) -> Any:
            recording.values[id(variable)] = value
            return value

        return assign

    with contextlib.ExitStack() as stack:
        for layer in lora_layers(model).values():
            stack.enter_context(layer.without_adapters())  # so that `kernel` is the variable
        placed = [stack.enter_context(_placed(site)) for site in _quantized(model)]
        for variable in [*model.variables, *(variable for variable, _ in placed)]:
            stack.callback(_set_assign, variable, vars(variable).get("assign"))
            vars(variable)["assign"] = catch(variable)
        yield
        for variable, site in placed:
            if id(variable) in recording.values:
                recording.values[id(site.matrix)] = recording.values.pop(id(variable))


def _quantized(model: keras.Model) -> list[Site]:
    layers = [node.layer for node in walk(model) if node.layer.built]
    sites = [site for layer in layers for site in sites_of(layer).values()]
    return [site for site in sites if site.is_quantized]


@contextlib.contextmanager
def _placed(site: Site) -> Iterator[tuple[keras.Variable, Site]]:
    """Within the context `kernel` of a quantized layer is a variable of the float shape.

    A converter assigns to that, and not to integers. It has one value, whatever its shape says.
    """
    layer, known = site.layer, type(site.layer)
    variable = keras.Variable(0.0, trainable=False)
    variable._shape = site.shape
    body = {"kernel": variable, "embeddings": variable}
    layer.__class__ = type(known.__name__, (known,), body)
    try:
        yield variable, site
    finally:
        layer.__class__ = known


def _set_assign(variable: keras.Variable, assign: Callable[[Any], Any] | None) -> None:
    """Give a variable an `assign` of its own again, or that of its class."""
    if assign is None:
        del vars(variable)["assign"]
    else:
        vars(variable)["assign"] = assign
