"""Learning rates by group: factors for `A`, `B`, magnitudes, rows, heads and biases; LoRA+.

An optimizer gets them in place, as a layer gets adapters: the object stays and its class changes,
so that everything that asks for the optimizer's settings, state or variables goes on as before.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_apply_weight_decay`: reads the learning rate itself, through `_get_current_learning_rate`.
    `_get_variable_index`: `update_step` is given TensorFlow's variable, not Keras's.
    `_parallel_update_step`: on torch some optimizers update all variables by one call.
    `_u_product`: what Nadam multiplies once a step, on torch once a call.
    `_use_weight_decay`: on torch an empty list of variables cannot decay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lora.checks import invalid, is_finite
from keras_lora.layers import group_of, in_group, parts_of
from keras_lora.lowrank.equations import Tensor

_PACKAGE = "keras_lora"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What multiplies the learning rate of each group."""

    a: float = 1.0
    b: float = 1.0
    magnitudes: float = 1.0
    tokens: float = 1.0
    heads: float = 1.0
    biases: float = 1.0

    def __post_init__(self) -> None:
        for name, factor in vars(self).items():
            if not is_finite(factor) or factor <= 0:
                expected = "a finite number above 0, which multiplies the learning rate"
                raise invalid(name, expected, factor, "1.0 leaves the rate as it is")
            object.__setattr__(self, name, float(factor))

    def of(self, group: str | None) -> float:
        return 1.0 if group is None else getattr(self, group)


def set_rates(
    optimizer: Any,
    *,
    a: float = 1.0,
    b: float = 1.0,
    magnitudes: float = 1.0,
    tokens: float = 1.0,
    heads: float = 1.0,
    biases: float = 1.0,
) -> Any:
    """Give an optimizer a learning rate for each group of variables.

        lr_v = factor(group of v) * lr        for each variable v that trains

    A variable moves as by the same optimizer with the learning rate `lr_v`: the factor is no factor
    on the gradient, which Adam and its kind would divide away. All that the optimizer computes with
    the rate has it, such as decoupled weight decay (`v <- v - lr_v * weight_decay * v`, as with
    PyTorch's parameter groups) and the velocity of SGD. `lr` is the optimizer's own: schedules, and
    callbacks that set `learning_rate`, act on all groups alike. Clipping, averages (`use_ema`),
    loss scales and accumulated gradients are as without factors.

    Which variable is in which group follows from the adapters, not from names, when the optimizer
    is built: the model may be adapted before or after `compile`. Variables of no adapter have the
    factor 1. `merge_lora` and `unload_lora`, which leave a plain model, take the factors off.

    Args:
        optimizer: An optimizer that is not built yet, or its name; any class that updates a
            variable by `update_step(gradient, variable, learning_rate)`, as all of Keras's do.
            Of a `LossScaleOptimizer` the inner one is meant, of a `MultiOptimizer` all in its map.
        a: The factor for `A`.
        b: The factor for `B`.
        magnitudes: The factor for the magnitudes `m` of DoRA.
        tokens: The factor for the rows of `train_tokens`.
        heads: The factor for what trains by `layers_to_save`.
        biases: The factor for what trains by `bias`.

    Returns:
        The optimizer itself. With all factors 1 it is plain again.

    Raises:
        ValueError: a factor that is not above 0, or an optimizer that is built, or whose parts a
            function makes.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2, bias="all"))
    >>> model.compile(kl.set_rates(keras.optimizers.AdamW(1e-4), b=16, biases=4), "mse")
    """
    rates = Rates(a=a, b=b, magnitudes=magnitudes, tokens=tokens, heads=heads, biases=biases)
    optimizer = keras.optimizers.get(optimizer)
    _check(optimizer)
    for part in parts_of(optimizer):
        _set(part, rates)
    return optimizer


def LoRAPlus(optimizer: Any, ratio: float = 16.0) -> Any:  # noqa: N802 (reads as an optimizer)
    """LoRA+: `B` learns faster than `A`.

        lr_B = ratio * lr_A

    With one rate for both, the features of a wide model are learned well at none: the paper derives
    `lr_A` in O(1 / width) and `lr_B` in O(1), and advises a ratio near 16, with an `lr` below that
    of LoRA. An embedding adapter, which begins with `A` at zero, has the same factors.

    Args:
        optimizer: An optimizer that is not built yet, or its name; see `set_rates`.
        ratio: `lr_B / lr_A`.

    Returns:
        The optimizer itself, with `set_rates(optimizer, b=ratio)`.

    Raises:
        ValueError: as `set_rates`.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> model.compile(kl.LoRAPlus(keras.optimizers.AdamW(1e-4), ratio=16), "mse")

    Reference: Hayou et al. 2024, https://arxiv.org/abs/2402.12354, section 4.
    """
    return set_rates(optimizer, b=ratio)


@contextlib.contextmanager
def without_rates(models: Iterable[keras.Model]) -> Iterator[None]:
    """Within the context the optimizers of models are plain."""
    rated = [(part, type(part)) for part in _parts(models) if isinstance(part, RatesByGroup)]
    for part, _ in rated:
        part.__class__ = part.plain_class
    try:
        yield
    finally:
        for part, rated_class in rated:
            part.__class__ = rated_class


def build_rated(model: keras.Model) -> None:
    """Let an optimizer with rates know its groups, which no layer of a `.keras` file knows."""
    optimizer: Any = getattr(model, "optimizer", None)
    if optimizer is None or optimizer.built:
        return
    if any(isinstance(part, RatesByGroup) for part in parts_of(optimizer)):
        optimizer.build(model.trainable_variables)


def remove_rates(models: Iterable[keras.Model]) -> None:
    """Make the optimizers of models plain, also those that are built."""
    for part in _parts(models):
        _set(part, Rates())


def _parts(models: Iterable[keras.Model]) -> list[Any]:
    optimizers = [x for m in models if (x := getattr(m, "optimizer", None)) is not None]
    return [part for optimizer in optimizers for part in parts_of(optimizer)]


def _check(optimizer: Any) -> None:
    if isinstance(optimizer, keras.optimizers.MultiOptimizer) and not optimizer.optimizers:
        raise invalid(
            "optimizer",
            "a MultiOptimizer with an OptimizerMap, whose optimizers are known",
            optimizer,
            "let the function return optimizers that have their rates: set_rates(Adam(1e-4), b=16)",
        )
    if optimizer.built:
        raise invalid(
            "optimizer",
            "one that is not built, since compiled steps compute with its rates",
            optimizer,
            "compile the model with a new one",
        )


def _set(part: Any, rates: Rates) -> None:
    plain = type(part).plain_class if isinstance(part, RatesByGroup) else type(part)
    part.__class__ = plain
    if rates != Rates():
        part.__class__ = _rated_class(plain)
        part.take(rates)


@functools.cache
def _rated_class(plain: type) -> type:
    # The module is of the plain class, whose computation it has.
    options = {"plain_class": plain, "__module__": plain.__module__}
    made = type(f"RatesByGroup[{plain.__name__}]", (RatesByGroup, plain), options)
    register = keras.saving.register_keras_serializable(_PACKAGE, RatesByGroup.__name__)
    register(made)  # under one name in files, which is read by:
    register(RatesByGroup)
    return made


@keras.saving.register_keras_serializable(_PACKAGE)
class RatesByGroup(keras.optimizers.Optimizer):
    """What `set_rates` puts before the class of an optimizer; its config is flat."""

    plain_class: type
    _rates: Rates
    _groups: Sequence[str | None] = ()  # of the variables that it is built for, or will be
    _factor = 1.0  # of the variables that decay

    def take(self, rates: Rates, groups: Sequence[str | None] = ()) -> None:
        self._rates, self._groups = rates, tuple(groups)

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        read = self._groups if len(self._groups) == len(variables) else ()
        for variable, group in zip(variables, read, strict=False):
            if group is not None and group_of(variable) is None:
                in_group(variable, group)
        self._groups = tuple(map(group_of, variables))

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Any) -> None:
        factor = self._factor_of(variable)
        super().update_step(gradient, variable, _times(learning_rate, factor))

    def _parallel_update_step(
        self, grads: Sequence[Tensor], variables: Sequence[keras.Variable], learning_rate: Any
    ) -> None:
        product = getattr(self, "_u_product", None)
        before = None if product is None else ops.copy(product)
        for factor, indices in self._by_factor(variables).items():
            if product is not None:
                product.assign(before)
            chosen = [grads[i] for i in indices], [variables[i] for i in indices]
            super()._parallel_update_step(*chosen, _times(learning_rate, factor))

    def _apply_weight_decay(self, variables: Sequence[keras.Variable]) -> None:
        decaying = [v for v in variables if self._use_weight_decay(v)]
        for factor, indices in self._by_factor(decaying).items():
            self._factor = factor
            try:
                super()._apply_weight_decay([decaying[i] for i in indices])
            finally:
                self._factor = 1.0

    def _get_current_learning_rate(self) -> Any:
        return _times(super()._get_current_learning_rate(), self._factor)

    def _by_factor(self, variables: Sequence[keras.Variable]) -> dict[float, list[int]]:
        """The indices of the variables that have a factor, by the factor."""
        indices: dict[float, list[int]] = {}
        for index, variable in enumerate(variables):
            indices.setdefault(self._factor_of(variable), []).append(index)
        return indices

    def _factor_of(self, variable: Any) -> float:
        return self._rates.of(self._groups[self._get_variable_index(variable)])

    def get_config(self) -> dict[str, Any]:
        own = {"rates": dataclasses.asdict(self._rates), "groups": list(self._groups)}
        return {**super().get_config(), **own, "optimizer": _named(self.plain_class)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        rates, groups, name = (config.pop(key) for key in ("rates", "groups", "optimizer"))
        if cls is not RatesByGroup:  # in this process, for other variables
            return set_rates(cls.plain_class.from_config(config), **rates)  # type: ignore[attr-defined]
        saved = {**name, "config": config}
        made = set_rates(keras.saving.deserialize_keras_object(saved, custom_objects), **rates)
        made.take(Rates(**rates), groups)
        return made


def _times(learning_rate: Any, factor: float) -> Any:
    return learning_rate if factor == 1 else learning_rate * factor


def _named(plain: type) -> dict[str, Any]:
    """What Keras's files call an optimizer's class; on torch Keras makes subclasses of its own."""
    for base in plain.__mro__ if plain.__module__.startswith("keras.") else ():
        if getattr(keras.optimizers, base.__name__, None) is base:
            return {"module": "keras.optimizers", "class_name": base.__name__}
    registered = keras.saving.get_registered_name(plain)
    return {
        "module": plain.__module__,
        "class_name": plain.__name__,
        "registered_name": registered,
    }
