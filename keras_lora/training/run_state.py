"""The state of a run of `fit` in a directory: what training changes, and how far it has come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_lora.checks import AdapterFileError, warn
from keras_lora.files.adapter_files import read_adapter_files, write_adapter_files
from keras_lora.layers import all_owned
from keras_lora.walker import Tree

_METRICS = "metrics/"


@dataclass(frozen=True)
class RunState:
    """Everything that training changes, and how far it has come."""

    epoch: int
    batches: int
    best: float | None
    ended: int | None  # once the run has ended: the number of epochs that it was asked for
    optimizer: str
    trained: Sequence[str]  # in the order in which the optimizer has them
    values: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls,
        model: keras.Model,
        epoch: int,
        batches: int,
        best: float | None,
        ended: int | None,
    ) -> RunState:
        tree = Tree.of(model)
        variables = _variables(model, tree) | _metrics(model)
        return cls(
            epoch,
            batches,
            best,
            ended,
            type(model.optimizer).__name__,
            _trained(model, tree.variable_keys),
            {key: _array(variable) for key, variable in variables.items()},
        )

    @classmethod
    def read(cls, directory: Path) -> RunState:
        files = read_adapter_files(directory, finite=False)
        names = {field.name for field in dataclasses.fields(cls)} - {"values"}
        if set(files.config) != names:
            raise _mismatch(directory, [f"the fields {sorted(files.config)}"])
        return cls(**files.config, values=files.tensors)

    def write(self, directory: Path) -> None:
        config = {name: value for name, value in vars(self).items() if name != "values"}
        write_adapter_files(directory, config, self.values, overwrite=True, finite=False)

    def check(self, model: keras.Model, directory: Path) -> None:
        """Refuse a state of another run.

        Raises:
            AdapterFileError: the state is of another run; everything that differs is listed.
        """
        tree = Tree.of(model)
        expected = {key: tuple(v.shape) for key, v in _variables(model, tree).items()}
        saved = {k: x.shape for k, x in self.values.items() if not k.startswith(_METRICS)}
        wrong = [
            f"{key}: {saved.get(key, 'nothing')}, expected {expected.get(key, 'nothing')}"
            for key in sorted(saved.keys() | expected.keys())
            if saved.get(key) != expected.get(key)
        ]
        if self.optimizer != type(model.optimizer).__name__:
            wrong.append(f"{self.optimizer}, expected {type(model.optimizer).__name__}")
        if not wrong and list(self.trained) != _trained(model, tree.variable_keys):
            wrong.append("another order of the variables that train")
        if wrong:
            raise _mismatch(directory, wrong)

    def assign(self, model: keras.Model) -> None:
        for key, variable in _variables(model, Tree.of(model)).items():
            variable.assign(self.values[key].astype(variable.dtype))

    def assign_metrics(self, model: keras.Model) -> None:
        metrics = _metrics(model)
        saved = {key for key in self.values if key.startswith(_METRICS)}
        if saved != set(metrics):
            warn(
                "The logs of the interrupted epoch leave out its first part: the metrics are not "
                "those of the run that is resumed."
            )
            return
        for key, variable in metrics.items():
            variable.assign(self.values[key].astype(variable.dtype))


def _variables(model: keras.Model, tree: Tree) -> dict[str, keras.Variable]:
    """The variables that training changes, by key."""
    keys = tree.variable_keys
    owned = [item.variable for item in all_owned(model.variables)]
    slots = [slot for bank in tree.banks for slot in bank.slots]
    # What starts take off again, or a frozen A, is drawn anew in a new process.
    frozen = [v for slot in slots for v in (*slot.factors, *(slot.counterpart or ()))]
    trained = {keys[id(v)]: v for v in [*model.trainable_variables, *owned, *frozen]}
    return (
        {f"values/{key}": variable for key, variable in trained.items()}
        | _numbered("optimizer/", model.optimizer.variables)
        # The variables that are no weights: seeds of dropout, also of the base.
        | _numbered("seeds/", [v for v in model.variables if id(v) not in keys])
    )


def _metrics(model: keras.Model) -> dict[str, keras.Variable]:
    return _numbered(_METRICS, model.metrics_variables)


def _trained(model: keras.Model, keys: Mapping[int, str]) -> list[str]:
    return [keys[id(v)] for v in model.trainable_variables]


def _numbered(prefix: str, variables: Sequence[keras.Variable]) -> dict[str, keras.Variable]:
    return {f"{prefix}{index}": variable for index, variable in enumerate(variables)}


def _array(variable: keras.Variable) -> np.ndarray:
    """A copy. Integers become float64, which represents them exactly up to 2**53."""
    array = np.array(ops.convert_to_numpy(variable), copy=True)
    return array.astype("float64") if array.dtype.kind in "iub" else array


def _mismatch(directory: Path, wrong: Sequence[str]) -> AdapterFileError:
    return AdapterFileError(
        f"Invalid {str(directory)!r}: expected the state of a run of this model. Received: "
        f"{'; '.join(wrong)}. Build, adapt and compile the model as in the interrupted run, "
        "or remove that directory to start anew."
    )
