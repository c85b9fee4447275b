"""Optimizers of models whose variables change: made anew, and what each keeps for a variable.

An optimizer is built for certain variables, so other variables need a new one of the same settings.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_exclude_from_weight_decay`, `_exclude_from_weight_decay_pattern`, `_var_key`: no config says
        what is excluded.
    `_iterations`: `iterations` leaves out the steps of gradients that are still being accumulated.
    `_learning_rate`: a schedule or a function, which a config may not be able to bring back.
    `_model_variables_moving_average`: begins with the value of its variable.
    `_optimizer_map`: which optimizer of a `MultiOptimizer` gets a variable.
    `_trainable_variables`: the variables that an optimizer was built for, in order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras

from keras_lora.layers import parts_of

_PLAIN = (bool, int, float, str, type(None))


def built_optimizer(model: keras.Model) -> Any | None:
    optimizer = getattr(model, "optimizer", None)
    return optimizer if optimizer is not None and optimizer.built else None


class Renewal:
    """A new optimizer with the settings of an old one, those outside its config included.

    Attributes:
        old: The optimizer.
        new: The new one, which is not built yet.
    """

    def __init__(self, optimizer: Any) -> None:
        """
        Raises:
            ValueError: the optimizer cannot be made from its own config.
        """
        self.old = optimizer
        self._made: dict[int, tuple[Any, Any]] = {}
        try:
            self.new = self._renewed(optimizer)
        except Exception as error:
            raise ValueError(
                "The variables that train are about to change, and the compiled optimizer must be "
                f"built anew. Expected one that from_config(get_config()) can make. Received: "
                f"{type(optimizer).__name__}, which cannot ({error}). Compile the model after this "
                "call instead: set model.optimizer = None first."
            ) from error

    def exclude(
        self, variables: Iterable[keras.Variable], replaced: Mapping[int, keras.Variable]
    ) -> None:
        """Exclude from weight decay what the old optimizer excludes.

        Args:
            variables: The variables of the model.
            replaced: New variables by the id of the variable in whose place they are.
        """
        known = {id(v): v for v in variables}
        for old, new in self._made.values():
            carry_exclusions(old, new, known.values(), replaced)

    def _renewed(self, optimizer: Any) -> Any:
        if id(optimizer) not in self._made:
            self._made[id(optimizer)] = optimizer, self._make(optimizer)
        return self._made[id(optimizer)][1]

    def _make(self, optimizer: Any) -> Any:
        if isinstance(optimizer, keras.optimizers.MultiOptimizer):
            options = {"loss_scale_factor": optimizer.loss_scale_factor, "name": optimizer.name}
            return type(optimizer)(self._renewed_map(optimizer), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a lambda, which is not taken from the config
            config = optimizer.get_config()
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            inner = self._renewed(optimizer.inner_optimizer)
            return type(optimizer)(**{**config, "inner_optimizer": inner})
        if not isinstance(optimizer._learning_rate, keras.Variable):
            config["learning_rate"] = optimizer._learning_rate
        made = type(optimizer).from_config(config)
        for name, value in vars(optimizer).items():
            if name != "built" and not name.startswith("_") and isinstance(value, _PLAIN):
                setattr(made, name, value)
        return made

    def _renewed_map(self, optimizer: Any) -> Callable[[keras.Variable], Any]:
        chosen = optimizer._optimizer_map
        for inner in optimizer.optimizers:
            self._renewed(inner)
        if not isinstance(chosen, keras.optimizers.OptimizerMap):
            return lambda variable: self._renewed_if_built(chosen(variable))
        by_path = {path: self._renewed(inner) for path, inner in chosen.items()}
        return keras.optimizers.OptimizerMap(self._renewed(chosen.default_optimizer), by_path)

    def _renewed_if_built(self, optimizer: Any) -> Any:
        # A function may return one optimizer again and again, or make a new one each time.
        return self._renewed(optimizer) if optimizer.built else optimizer


def carry_exclusions(
    old: Any,
    new: Any,
    variables: Iterable[keras.Variable],
    replaced: Mapping[int, keras.Variable],
) -> None:
    """Exclude from the weight decay of `new` what `old` excludes, also in the place of that."""
    keys = getattr(old, "_exclude_from_weight_decay", ())
    pattern = getattr(old, "_exclude_from_weight_decay_pattern", None)
    if not keys and pattern is None:
        return
    excluded = [v for v in variables if old._var_key(v) in keys]
    excluded += [replaced[id(v)] for v in excluded if id(v) in replaced]
    new.exclude_from_weight_decay(excluded, None if pattern is None else [pattern.pattern])


def states_by_variable(optimizer: Any) -> dict[int, list[keras.Variable]]:
    """What a built optimizer keeps for each variable that it trains, by the variable's id.

    As Keras's own optimizers do, it has lists with an entry for each of these variables.
    """
    states: dict[int, list[keras.Variable]] = {}
    for part in parts_of(optimizer):
        trained = part._trainable_variables
        lists = _lists(part, len(trained))
        for index, variable in enumerate(trained):
            entries = [entries[index] for entries in lists]
            states[id(variable)] = [entry for entry in entries if entry is not None]
    return states


def _lists(part: Any, length: int) -> list[list[keras.Variable | None]]:
    """The lists of an optimizer's own variables that have this length."""
    own = {id(v) for v in part.variables}
    lists = [x for name, x in vars(part).items() if isinstance(x, list) and name != "_variables"]
    return [
        x
        for x in lists
        if len(x) == length and any(v is not None for v in x)
        if all(v is None or id(v) in own for v in x)
    ]


def shared_state(optimizer: Any) -> list[keras.Variable]:
    """What a built optimizer keeps for all its variables, such as the number of steps.

    Learning rates, which stay as they are, are no part of the state.
    """
    apart = {id(v) for states in states_by_variable(optimizer).values() for v in states}
    apart |= {id(getattr(part, "learning_rate", None)) for part in parts_of(optimizer)}
    return [v for v in optimizer.variables if id(v) not in apart]


def steps_of(optimizer: Any) -> int:
    """How many steps an optimizer has made."""
    return max(int(keras.ops.convert_to_numpy(p._iterations)) for p in parts_of(optimizer))


def averages(optimizer: Any) -> set[int]:
    """The ids of the moving averages of the variables' values (`use_ema`)."""
    lists = [getattr(p, "_model_variables_moving_average", ()) for p in parts_of(optimizer)]
    return {id(v) for entries in lists for v in entries if v is not None}
