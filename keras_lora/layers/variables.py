"""Adapted classes of layers with bare variables: matrices that only the layer's own code knows.

A class is made for each class of such layers. In it the attributes of the matrices are effective
ones, and all else is as it was: nothing is known of what the code computes with them.

    2 axes: W (d, k)       A (d, r)       B (r, k)
    3 axes: W (n, d, k)    A (n, d, r)    B (n, r, k)      a matrix for each of n experts
    more:   W (..., k)     A (..., r)     B (r, k)

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    the attributes of KerasHub's layers of experts, which have no public names.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import keras

from keras_lora.checks import invalid
from keras_lora.config import AdapterSpec
from keras_lora.layers.adaptable import remember_flag
from keras_lora.layers.converting import convert, fill
from keras_lora.layers.effective import BaseVariables, EffectiveMatrix, forming
from keras_lora.layers.factored_calls import factored
from keras_lora.layers.guarded import Adapting, adapted_class
from keras_lora.layers.kinds import KINDS, Kind, Layer, Site, dense_equation
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.slots import Room

# The banks of experts of KerasHub's mixtures, in the classes that have them.
_GATED = ("_expert_feedforward_gate_dense", "_expert_feedforward_output_dense")
EXPERTS: Mapping[str, tuple[str, ...]] = {
    "MixtralMoeExperts": (*_GATED, "_expert_feedforward_intermediate_dense"),
    "QwenMoeExperts": _GATED,
    "Qwen3MoeExperts": _GATED,
    "Qwen3_5MoeExperts": _GATED,
    "GptOssExperts": ("gate_up_proj", "down_proj"),
    "Gemma4MoEBlock": ("gate_proj", "up_proj", "down_proj"),
}
_FILE_NAME = ("keras_lora", "LoRAVariables")
_LETTERS = "abcdefghijklmnop"


class _Matrix(NamedTuple):
    """A matrix among a layer's attributes, of which a kind is made."""

    name: str
    attribute: str
    item: int | str | None
    axes: int
    is_expert: bool


_Matrices: TypeAlias = "tuple[_Matrix, ...]"
_Place: TypeAlias = "tuple[str, int | str | None]"


@keras.saving.register_keras_serializable(*_FILE_NAME)
class LoRAVariables(LoRALayer, Adapting):
    """Abstract base of adapted layers whose own code reads their matrices as attributes.

    Their classes are made in place, so their config is that of the plain layer, with the adapters
    of each matrix beside it. Keras finds every such class under the one name of `_FILE_NAME`.
    """

    @property
    def is_listed(self) -> bool:
        """Whether a config can bring the layer back: Keras knows what to build it for."""
        return not isinstance(self, keras.Model) and bool(self.get_build_config())

    def get_config(self) -> dict[str, Any]:
        banks, ours = self.banks.items(), {id(v) for v in self.adapter_variables}
        specs = {
            matrix: {name: adapter.acting_spec.to_dict() for name, adapter in bank.adapters.items()}
            for matrix, bank in banks
        }
        return {
            "plain": self._plain_config(),
            "adapters": specs,
            "active": {matrix: list(bank.active) for matrix, bank in banks},
            "room": {matrix: dataclasses.asdict(bank.room) for matrix, bank in banks},
            "train_bias": False,
            "trains": [bool(v.trainable) for v in self.variables if id(v) not in ours],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        plain, adapted = config["plain"], adapted_class(cls)
        # A clone is of a class that is at hand, which Keras may not know by name.
        same = (plain["module"], plain["class_name"]) == (adapted.__module__, adapted.__name__)
        known = {adapted.__name__: adapted} if same else {}
        layer: Any = keras.saving.deserialize_keras_object(plain, custom_objects=known)
        variables = layer.variables
        convert(layer, variables_class(layer))
        for variable, trains in zip(variables, config["trains"], strict=True):
            remember_flag(variable)
            variable.trainable = trains
        for matrix, bank in layer.banks.items():
            specs = {n: AdapterSpec(**spec) for n, spec in config["adapters"][matrix].items()}
            fill(bank, specs, config["active"][matrix], Room(**config["room"][matrix]))
        return layer

    def _plain_config(self) -> dict[str, Any]:
        lora_class, self.__class__ = type(self), self.base_class
        try:
            return dict(keras.saving.serialize_keras_object(self))
        finally:
            self.__class__ = lora_class


def bare_sites(layer: Layer) -> dict[str, Site]:
    """The matrices of a plain layer whose computation only its own code knows, by name."""
    kinds = _kinds(_matrices(layer))
    return {name: Site(layer, kind, name) for name, kind in kinds.items()}


def variables_class(layer: Layer) -> type[LoRALayer]:
    """The class that a plain layer with `bare_sites` is converted to."""
    layer_class: Any = type(layer)
    return _made_class(layer_class, _matrices(layer))


def check_bare(layer: Layer, site: Site) -> None:
    """Refuse a bare matrix that cannot be an effective one.

    Raises:
        ValueError: a constraint, a second attribute with the variable, or an attribute with a
            name that adapted layers use.
    """
    name = f"{layer.path or layer.name}/{site.name}"
    if site.matrix.constraint is not None:
        raise invalid(
            name,
            "no constraint, which would hold for W0 and not for W0 + AB",
            site.matrix.constraint,
            "exclude it",
        )
    holding = [place for place, value in _places(layer).items() if value is site.matrix]
    if len(holding) > 1:
        raise invalid(
            name, "a variable in one attribute of its layer", _named(holding), "exclude it"
        )
    effective = {matrix.attribute for matrix in _matrices(layer)}
    taken = sorted(_own_names(layer) & _names_of_ours() - effective)
    if taken:
        raise invalid(
            name,
            "a layer without attributes of names that adapted layers use",
            taken,
            "rename them in the class of the layer",
        )


def _matrices(layer: Layer) -> _Matrices:
    """The matrices among a built layer's attributes."""
    if not layer.built:
        return ()
    every = _places(layer)
    first = {id(value): place for place, value in reversed(every.items())}
    held = {place: value for place, value in every.items() if first[id(value)] == place}
    known = _experts(type(layer))
    names = [_stable_name(v, *place) for place, v in held.items()]
    return tuple(
        _Matrix(
            name if names.count(name) == 1 else _named([place])[0],
            *place,
            len(v.shape),
            place[0] in known,
        )
        for name, (place, v) in zip(names, held.items(), strict=True)
    )


def _places(layer: Layer) -> dict[_Place, keras.Variable]:
    """The matrices of a layer, by the attribute and, in a list, tuple or dict, the item."""
    return {
        (name, item): each
        for name, value in vars(layer).items()
        if name not in _of_every_layer()
        for item, each in _items(value)
        if _is_matrix(each)
    }


def _items(value: Any) -> Iterable[tuple[int | str | None, Any]]:
    if isinstance(value, dict):
        return ((key, each) for key, each in value.items() if isinstance(key, str))
    if isinstance(value, list | tuple):
        return enumerate(value)
    return [(None, value)]


@cache
def _of_every_layer() -> frozenset[str]:
    """The attributes of every layer, in some of which Keras or TensorFlow lists the variables."""
    tensorflow = (
        "_self_unconditional_dependency_names",
        "_self_unconditional_checkpoint_dependencies",
    )
    return frozenset({*vars(keras.layers.Layer()), *tensorflow})


def _named(places: Sequence[_Place]) -> list[str]:
    return [name if item is None else f"{name}_{item}" for name, item in places]


def _is_matrix(value: Any) -> bool:
    return (
        isinstance(value, keras.Variable)
        and len(value.shape) > 1
        and keras.backend.is_float_dtype(value.dtype)
    )


def _stable_name(variable: keras.Variable, attribute: str, item: int | str | None) -> str:
    """The variable's name, or that of its attribute where Keras numbered the variable."""
    name = str(variable.name)
    by_user = name.isidentifier() and not name.startswith("variable")
    return name if by_user else _named([(attribute, item)])[0]


def _experts(layer_class: type) -> tuple[str, ...]:
    names = [c.__name__ for c in layer_class.__mro__ if c.__module__.startswith("keras_hub.")]
    return next((EXPERTS[name] for name in names if name in EXPERTS), ())


@cache
def _kinds(matrices: _Matrices) -> Mapping[str, Kind]:
    return {
        matrix.name: Kind(
            equation=_equation(matrix.axes),
            matrix=matrix.attribute,
            item=matrix.item,
            bias=None,
            constraint=None,
            family="expert" if matrix.is_expert else "weight",
            # The layer's code has the products.
            has_dropout=False,
            # The axis of the outputs is known of experts alone.
            takes_dora=matrix.is_expert,
            must_save=True,
        )
        for matrix in matrices
    }


def _equation(axes: int) -> Callable[[Layer], str]:
    if axes == 2:
        return dense_equation
    rows = _LETTERS[: axes - 1]
    return partial(_said, "...zx,zxy->...zy" if axes == 3 else f"...{rows},{rows}y->...y")


def _said(equation: str, _: Layer) -> str:
    return equation


@cache
def _made_class(layer_class: Any, matrices: _Matrices) -> type[LoRALayer]:
    effective = {matrix.attribute: EffectiveMatrix() for matrix in matrices}
    bases = (LoRAVariables, layer_class, BaseVariables)
    # A subclass of a layer with a kernel reads the property of its own class.
    kernel = inspect.getattr_static(layer_class, "kernel", None)
    own = {} if kernel is None else {"kernel": kernel}
    call = factored(layer_class.call) if _experts(layer_class) else layer_class.call
    body = {**own, **effective, "call": _forming(call)}
    made = type(f"LoRA{layer_class.__name__}", bases, body)
    KINDS[made] = _kinds(matrices)
    return keras.saving.register_keras_serializable(*_FILE_NAME)(made)


def _forming(call: Any) -> Any:
    @functools.wraps(call)  # Keras asks for the arguments of `call`
    def call_formed(layer: Any, *args: Any, **kwargs: Any) -> Any:
        with forming([layer]):
            return call(layer, *args, **kwargs)

    return call_formed


def _own_names(layer: Layer) -> set[str]:
    """The attributes that a layer has beyond those of every layer, or of its Keras layer."""
    known = next((c for c in type(layer).__mro__ if c in KINDS), keras.layers.Layer)
    classes = [c for c in type(layer).__mro__ if c not in known.__mro__]
    return {*vars(layer)}.union(*map(vars, classes)) - {*dir(keras.layers.Layer)}


@cache
def _names_of_ours() -> set[str]:
    ours = [c for c in LoRALayer.__mro__ if issubclass(c, Adapting)]
    return set[str]().union(*map(vars, ours)) - {*dir(keras.layers.Layer)}
