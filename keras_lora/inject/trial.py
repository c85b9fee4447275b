"""What a model does with variables apart from calling the layers that own them.

An adapter changes what its layer computes, and freezes everything else. Another layer that reads
the same matrix computes with `W0` until the adapter is merged, and with `W` from then on. A layer
that assigns to variables while it trains moves what is frozen. No config tells either, so the
model's `call` is tried on symbols: nothing is computed, and no value changes.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_inbound_nodes`: the only way to the variables that a functional graph has as constants.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

import keras

from keras_lora.checks import warn
from keras_lora.inject.freezing import flags_kept, original_flag
from keras_lora.inject.plan import Plan
from keras_lora.inject.sources import may_touch_variables
from keras_lora.layers import LoRALayer, Site, with_items
from keras_lora.walker import Layer, Tree


def check_plan(tree: Tree, plan: Plan) -> None:
    """Refuse an adapter whose layers others compute with, or whose base would move in training.

    Raises:
        ValueError: a layer keeps or reads the matrix of another one that is to be adapted, or
            assigns to a variable that is to be frozen.
    """
    sites = [x.target.site for x in plan.layers if not isinstance(x.target.layer, LoRALayer)]
    if sites and check_readers(tree, sites):
        with flags_kept([*tree.layers, *tree.root.variables]):
            tree.root.trainable = False  # what looks at its flag moves nothing
            assigned = _tried(tree, (), always=True).assigned
        _check_assigned(tree, assigned, plan.owned, sites)


def moving_variables(tree: Tree) -> Mapping[int, Layer]:
    """The layers that assign to variables in training, by the id of the variable."""
    return _tried(tree, (), always=True).assigned


def check_readers(tree: Tree, sites: Sequence[Site]) -> bool:
    """Refuse matrices that another layer than their own computes with.

    Returns:
        Whether a training step assigns to variables.

    Raises:
        ValueError: a layer keeps or reads such a matrix.
    """
    _raise_kept(_keepers(tree, sites), "keeps")
    bare = [site for site in sites if site.kind.family == "weight"]
    watch = _tried(tree, sites, always=bool(bare))
    _raise_kept(watch.read, "reads")
    unread = [site for site in bare if id(site.matrix) not in watch.own_read]
    if unread and watch.finished:
        warn(
            "Expected variables that the code of their layers reads as attributes when the model "
            f"is called. Received: {sorted(s.matrix.path for s in unread)}, which it does not "
            "read so: the adapter has no effect on them until it is merged. Read "
            f"`self.{unread[0].attribute}` in `call`, or exclude the variable."
        )
    return bool(watch.assigned)


def _raise_kept(found: Mapping[str, str], does: str) -> None:
    if found:
        uses = [f"'{reader}' {does} that of '{owner}'" for owner, reader in found.items()]
        raise ValueError(
            "Expected matrices that their own layers alone compute with: another would go on with "
            f"W0, until it computes something else once the adapter is merged. Received: "
            f"{', '.join(uses)}. Exclude {sorted(found)} from the adapter. Or read "
            "`layer.kernel` (of an embedding, `layer.embeddings`) in `call`, at each call: of an "
            "adapted layer that is the effective matrix."
        )


def _check_assigned(
    tree: Tree,
    assigned: Mapping[int, Layer],
    owned: Iterable[keras.Variable],
    sites: Sequence[Site],
) -> None:
    """Refuse what moves a frozen variable, and warn of state that moves, frozen or not."""
    free = {id(v) for v in owned}
    # The states of a stateful RNN are of the batch before, and not of what was learned.
    moved = [
        v
        for v in tree.root.weights
        if id(v) not in free and not isinstance(assigned.get(id(v)), keras.layers.RNN | NoneType)
    ]
    if not moved:
        return
    message = (
        "Expected a base that stays as it is while an adapter trains. Received: "
        f"{sorted({assigned[id(v)].name for v in moved})}, which assign to "
        f"{sorted(v.path for v in moved)} in training, frozen or not. Name them in "
        "`layers_to_save`, so that the adapter has values of its own, or take them out of the "
        "model (for a SpectralNormalization: put the layer that it wraps in its place)."
    )
    adapted = {id(site.matrix) for site in sites}
    if any(original_flag(v) or id(v) in adapted for v in moved):
        raise ValueError(message)
    warn(message)


def _keepers(tree: Tree, sites: Sequence[Site]) -> dict[str, str]:
    """The layers with a matrix of another one among their attributes, by the owner's name."""
    owners = {id(site.matrix): site.layer for site in sites}
    attributes = ((layer, value) for layer in tree.layers for value in _attributes(layer))
    arguments = (pair for model in tree.models for pair in _arguments(model))
    return {
        owners[id(value)].name: user.name
        for user, value in [*attributes, *arguments]
        if id(value) in owners and owners[id(value)] is not user
    }


def _attributes(layer: Layer) -> Iterator[Any]:
    for value in vars(layer).values():
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list | tuple | set):
            yield from value
        else:
            yield value


def _arguments(model: keras.Model) -> Iterator[tuple[keras.Operation, Any]]:
    """The arguments of each operation in a functional graph."""
    for operation in getattr(model, "operations", ()):
        for node in operation._inbound_nodes:
            for value in [*node.arguments.args, *node.arguments.kwargs.values()]:
                yield operation, value


class _Watch(keras.StatelessScope):
    """Notes which of the watched variables are read, which variables are assigned to, and where.

    Attributes:
        read: Names of layers with a matrix that another one reads, and of the reader.
        assigned: The layers that assign to variables, by the id of the variable.
        own_read: The ids of the matrices that are read as attributes.
        own: The ids of matrices, by the id of the object that the attribute is in the trial.
        finished: Whether the model could be tried.
    """

    def __init__(self, owners: Mapping[int, Layer]) -> None:
        super().__init__()
        self._owners = owners
        self.read: dict[str, str] = {}
        self.assigned: dict[int, Layer] = {}
        self.own_read: set[int] = set()
        self.own: Mapping[int, int] = {}
        self.finished = False

    def get_current_value(self, variable: keras.Variable) -> Any:
        owner = self._owners.get(id(variable))
        if owner is not None and (reader := _calling_layer()) is not owner:
            self.read[owner.name] = reader.name
        if id(variable) in self.own:
            self.own_read.add(self.own[id(variable)])
        return super().get_current_value(variable)

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        self.assigned[id(update[0])] = _calling_layer()
        super().add_update(update)


def _calling_layer() -> Layer:
    """The innermost layer whose code is running; in a trial the model's runs at least."""
    frame: Any = inspect.currentframe()
    while not isinstance(layer := frame.f_locals.get("self"), keras.layers.Layer):
        frame = frame.f_back
    return layer


class _Trial(keras.Operation):
    """A model's `call` in training, watched."""

    def __init__(self, model: Layer, watch: _Watch) -> None:
        super().__init__()
        self._model, self._watch = model, watch

    def call(self, *args: Any, **options: Any) -> Any:
        with self._watch:
            return self._model(*args, **options, training=True)


def _tried(tree: Tree, sites: Sequence[Site], always: bool = False) -> _Watch:
    """A trial, where some code may touch variables."""
    watch = _Watch({id(site.matrix): site.layer for site in sites})
    if always or any(may_touch_variables(layer) for layer in tree.layers):
        with _own_matrices(sites) as watch.own:
            for args, options in _inputs(tree.root):
                # A model that takes other inputs cannot be tried.
                with contextlib.suppress(Exception):
                    _Trial(tree.root, watch).compute_output_spec(*args, **options)
                    watch.finished = True
                    break
    return watch


@contextlib.contextmanager
def _own_matrices(sites: Sequence[Site]) -> Iterator[Mapping[int, int]]:
    """Within the context a layer's own code reads a second object of its matrix, of the same
    memory. So whoever reads the first object reads it as a variable of another layer.
    """
    matrices = [site.matrix for site in sites]
    twins = [copy.copy(matrix) for matrix in matrices]
    held = []
    for site, twin in zip(sites, twins, strict=True):
        attributes, name, item = vars(site.layer), site.attribute, site.kind.item
        held.append((attributes, name, attributes[name]))
        attributes[name] = twin if item is None else with_items(attributes[name], {item: twin})
    try:
        yield {id(twin): id(matrix) for twin, matrix in zip(twins, matrices, strict=True)}
    finally:
        for attributes, name, value in reversed(held):
            attributes[name] = value


def _inputs(model: Layer) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
    """Symbolic inputs that a model may take, the most likely first."""
    if getattr(model, "inputs", None) is not None:
        sequential = isinstance(model, keras.Sequential)
        yield [_symbols(model.inputs[0] if sequential else model.input)], {}
        return
    shapes = (model.get_build_config() or {}) if model.built else {}
    for dtype in (model.compute_dtype, "int32"):
        if shapes.get("input_shape") is not None:
            yield [_symbol(shapes["input_shape"], dtype)], {}
        for named in [shapes["shapes_dict"]] if "shapes_dict" in shapes else []:
            yield [], {n.removesuffix("_shape"): _symbol(s, dtype) for n, s in named.items()}


def _symbols(inputs: Any) -> Any:
    return keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape, x.dtype, x.sparse), inputs)


def _symbol(shape: Any, dtype: str) -> Any:
    return keras.KerasTensor(tuple(shape), dtype)
