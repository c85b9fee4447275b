"""Running a converter of KerasHub without a checkpoint, to see which weight goes where."""

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
from keras_lora.walker import lora_layers


@dataclass
class Recording:
    """What a converter assigns.

    Attributes:
        values: What each variable gets, by the variable's `id`: a `Traced`, or a value that the
            converter computed outside numpy.
        stopped: Why the converter did not run to its end, or None.
    """

    values: dict[int, Any] = field(default_factory=dict)
    stopped: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What is assumed of a checkpoint: endings of names that it lacks, the axes of its tensors."""

    absent: tuple[str, ...]
    axes: int = 0


# No torch module has LayerNorm weights of these names, only files from TensorFlow's BERT.
_TENSORFLOW = "LayerNorm.gamma", "LayerNorm.beta"
# A converter that stops with one may go on with another: Gemma 3n's asks whether a norm is a
# batch norm, and that of GPT-OSS for the four lengths of its packed experts.
_CHECKPOINTS = [
    Checkpoint(_TENSORFLOW),
    Checkpoint((*_TENSORFLOW, "running_mean")),
    Checkpoint(_TENSORFLOW, axes=4),
]


class RecordingLoader:
    """In the place of KerasHub's `SafetensorLoader`: it has every weight, and no value.

    Converters ask for some names to see whether a file has them; `absent` are the endings of
    those that it does not have.
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
        if isinstance(keras_variable, keras.Variable):  # not so with Keras's own LoRA enabled
            self.recording.values[id(keras_variable)] = value


def record(model: keras.Model, backbone: keras.Model, converter: Converter) -> Recording:
    """Run a converter on a model whose variables do not change by it."""
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
            # It is of one kind of task only, and stops at once at another.
            _run(convert_head, model, loader, converter)
    return recording


def _run(
    convert: Callable[..., Any], model: keras.Model, loader: RecordingLoader, converter: Converter
) -> str | None:
    """Why the converter did not run to its end; what it did before counts."""
    try:
        convert(model, loader, converter.config)
    except MissingFieldError:
        raise
    except Exception as error:  # whatever it computes with what is no array
        return f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Converters print and warn of what a checkpoint lacks, and here it lacks all."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def caught_assignments(model: keras.Model, recording: Recording) -> Iterator[None]:
    """Within the context the variables of a model do not change: an assignment is recorded."""

    def catch(variable: keras.Variable) -> Callable[[Any], Any]:
        def assign(value: Any) -> Any:
            recording.values[id(variable)] = value
            return value

        return assign

    with contextlib.ExitStack() as stack:
        for layer in lora_layers(model).values():
            stack.enter_context(layer.without_slots())  # its kernel is else no variable
        for variable in model.variables:
            vars(variable)["assign"] = catch(variable)
            stack.callback(vars(variable).pop, "assign")
        yield
