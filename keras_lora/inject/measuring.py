"""What starts measure on data before an adapter is added: inputs of layers, gradients of matrices.

The model computes as it is, without the new adapter, and is left as it was: values, flags,
optimizer and compiled functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.checks import invalid
from keras_lora.initializers import randomized_svd, start_of
from keras_lora.initializers.starts import Measure
from keras_lora.inject.correcting import check_weights, with_weights
from keras_lora.inject.freezing import flags_kept, let_train
from keras_lora.inject.plan import Plan, PlannedLayer
from keras_lora.layers import Site
from keras_lora.layers.factors import read, write
from keras_lora.walker import Tree

_BATCHES = 8
_ITERATIONS = 4
# Of a scale of 16 bits, so that small gradients are not rounded to zero; it is taken off exactly.
_LOSS_SCALE = 256.0
# Of the same data the same is found.
_SEED = 0
# Inputs of so many values at most have their products summed up: exact, and in less time.
_SUMMED = 512


def check_data(tree: Tree, plan: Plan, init: str, data: Any) -> Measure | None:
    """What the start of a config measures; None for one that needs no data.

    Raises:
        ValueError: data that is missing, not needed or of no form that `fit` takes, or layers or a
            model that cannot be measured.
    """
    measure = start_of(init).measures
    if (data is None) is not (measure is None):
        wanted = {"weights": "the model in floating point"}
        expected = "None" if measure is None else wanted.get(measure, "a few batches")
        raise invalid("data", f"{expected} for init={init!r}", type(data))
    if measure is None:
        return None
    if measure == "weights":
        check_weights(tree, plan, init, data)
        return measure
    check_batches(data)
    _check_sites(plan, init)
    if measure == "gradient":
        _check_trainable(plan, init)
        _check_model(tree)
    elif tree.adapted:
        _refuse_adapted(tree, init)
    return measure


def check_batches(data: Any) -> None:
    """
    Raises:
        ValueError: data of no form in which `batches_of` finds batches.
    """
    iterable = hasattr(data, "__iter__") or hasattr(data, "num_batches")
    if isinstance(data, tuple | Mapping | str) or hasattr(data, "shape") or not iterable:
        fix = "put the batches in a list: data=[(x, y)]"
        raise invalid("data", "batches, as a dataset gives them to fit", type(data), fix)


def _check_sites(plan: Plan, init: str) -> None:
    starting = [x.target for x in plan.layers if x.spec.rank]
    others = [target.path for target in starting if target.site.kind.family != "linear"]
    if others:
        fix = "exclude them, or give them an adapter of their own with another start"
        raise invalid("init", f"a start that {others} can take, which are not linear", init, fix)


def _check_trainable(plan: Plan, init: str) -> None:
    integers = [x.target.path for x in plan.layers if x.target.site.is_quantized]
    if integers:
        fix = "exclude them, or take a start without a gradient"
        expected = f"a start that {integers} can take, which are quantized and have no gradient"
        raise invalid("init", expected, init, fix)


def _check_model(tree: Tree) -> None:
    model = tree.root
    if tree.adapted:
        _refuse_adapted(tree, "lora_ga")
    if not getattr(model, "compiled", False):
        fix = "call model.compile(optimizer, loss) before"
        raise invalid("model", "a compiled model for init='lora_ga', for its loss", model.name, fix)


def _refuse_adapted(tree: Tree, init: str) -> None:
    names = sorted({name for bank in tree.banks for name in bank.adapters})
    fix = "add this adapter first, or load it into the adapted model from its files"
    raise invalid("init", f"a start without data for a model with the adapters {names}", init, fix)


@dataclass(frozen=True)
class Measured:
    """What was measured on a layer: directions of its inputs `X`, or the gradient `G` of `W0`.

    Attributes:
        values: `(shared, n, d)`, vectors with the singular values and right-singular vectors of
            `X`, the largest ones; or `G`, `(shared, d, k)`.
        energy: `|X|^2` or `|G|^2`.
    """

    values: np.ndarray
    energy: float


def measured_plan(tree: Tree, plan: Plan, measure: Measure, data: Any) -> Plan:
    """The plan, with what its start has measured on each layer.

    Raises:
        ValueError: layers that the data does not reach.
    """
    if measure == "weights":
        return with_weights(tree, plan, data)
    found = measured(tree, plan, measure, data)
    layers = [dataclasses.replace(x, measured=found[x.target.path].values) for x in plan.layers]
    return dataclasses.replace(plan, layers=layers)


def measured(tree: Tree, plan: Plan, measure: Measure, data: Any) -> dict[str, Measured]:
    """What is measured on each layer, by path.

    Raises:
        ValueError: layers that the data does not reach, or at which it is not finite.
    """
    with left_as_it_was(tree.root):
        found = (_inputs if measure == "inputs" else _gradients)(tree, plan.layers, data)
    missing = [x.target.path for x in plan.layers if not _reached(found.get(x.target.path))]
    if missing:
        received = f"no {'inputs' if measure == 'inputs' else 'gradient'} of {missing}"
        raise invalid("data", "batches that reach each target", received, "exclude these layers")
    return found


def _finite(energy: float, what: str, path: str) -> float:
    if not math.isfinite(energy):
        fix = "look at the data, and at the weights of the base"
        raise invalid("data", f"batches with finite {what}", f"NaN or infinity at {path!r}", fix)
    return energy


def _reached(found: Measured | None) -> bool:
    return found is not None and bool(np.any(found.values))


def batches_of(data: Any, most: int = _BATCHES) -> Iterable[Any]:
    """The first batches of a dataset."""
    count = getattr(data, "num_batches", None)
    return islice(data, most) if count is None else map(data.__getitem__, range(min(count, most)))


@contextlib.contextmanager
def left_as_it_was(
    model: keras.Model, others: Iterable[keras.Variable] = ()
) -> Iterator[Callable[[], None]]:
    """Afterwards states, seeds, metrics and the other variables have the values from before.

    Yields:
        A function that gives them these values at once.
    """
    metrics = getattr(model, "metrics_variables", ())
    variables = [*model.non_trainable_variables, *metrics, *others]
    values = [read(v) for v in variables]

    def restore() -> None:
        if isinstance(model, keras.Model):
            model.reset_metrics()
        for variable, value in zip(variables, values, strict=True):
            write(variable, value)

    try:
        yield restore
    finally:
        restore()


def _inputs(tree: Tree, layers: Sequence[PlannedLayer], data: Any) -> dict[str, Measured]:
    """Of each layer, by path, vectors with the right-singular vectors of its inputs."""
    model, found = tree.root, dict[str, _Seen]()
    with contextlib.ExitStack() as stack:
        for planned in layers:
            stack.enter_context(_watching(planned, found))
        for batch in batches_of(data):
            model(preprocessed(model, batch)[0], training=False)
    return {path: seen.measured() for path, seen in found.items()}


def preprocessed(model: keras.Model, batch: Any) -> tuple[Any, Any, Any]:
    """`x`, `y` and weights of a batch, as the model itself takes them."""
    sample = keras.utils.unpack_x_y_sample_weight(batch)
    preprocess = getattr(model, "preprocess_samples", None)  # of a KerasHub task
    if preprocess is not None:
        sample = keras.utils.unpack_x_y_sample_weight(preprocess(*sample))
    return sample


@contextlib.contextmanager
def _watching(planned: PlannedLayer, found: dict[str, _Seen]) -> Iterator[None]:
    """Within the context the layer's inputs are added to what is found of it."""
    layer, path = planned.target.layer, planned.target.path
    name = "quantized_call" if planned.target.site.is_quantized else "call"
    call: Callable[..., Any] = getattr(layer, name)

    def watched(*args: Any, **options: Any) -> Any:
        new = _vectors(planned.target.site, args[0] if args else options["inputs"])
        found.setdefault(path, _Seen(path, planned.spec.rank)).add(new)
        return call(*args, **options)

    vars(layer)[name] = watched
    try:
        yield
    finally:
        del vars(layer)[name]


def _vectors(site: Site, x: Any) -> np.ndarray:
    """Inputs as `(shared, n, d)`."""
    split = site.split(len(x.shape))
    d, _ = split.matrix_shape(site.shape)
    values = np.asarray(ops.convert_to_numpy(x)).astype("float32")
    order = f"{split.input}->{split.shared}{split.batch}{split.contracted}"
    return np.einsum(order, values).reshape(split.stacked_shape(site.shape)[0], -1, d)


class _Seen:
    """The inputs `X` of a layer so far, as what has their singular values and directions.

    More than the rank are kept: what is small in one batch may be large in the next ones.
    """

    def __init__(self, path: str, rank: int) -> None:
        self._path, self._most, self._count, self._energy = path, 2 * rank, 0, 0.0
        self._products: Any = 0.0  # X^T X, (shared, d, d)
        self._vectors: np.ndarray | None = None  # where that would be too large

    def add(self, new: np.ndarray) -> None:
        """Inputs as `(shared, n, d)`."""
        wide = new.astype("float64")
        self._count += new.shape[1]
        self._energy += float(np.square(wide).sum())
        if not math.isfinite(self._energy):
            return  # refused in `measured`, outside of the layer's call
        if new.shape[2] <= _SUMMED:
            self._products = self._products + wide.swapaxes(1, 2) @ wide
        else:
            known = [] if self._vectors is None else [self._vectors]
            self._vectors = _directions(np.concatenate([*known, new], 1), self._most)

    def measured(self) -> Measured:
        _finite(self._energy, "inputs", self._path)
        if self._vectors is not None:
            return Measured(self._vectors, self._energy)
        squares, v = np.linalg.eigh(self._products)  # the smallest first
        last = slice(None, -min(self._most, self._count, v.shape[-1]) - 1, -1)
        values = np.sqrt(np.maximum(squares[:, last], 0))
        vectors = values[..., None] * v.swapaxes(1, 2)[:, last]
        return Measured(vectors.astype("float32"), self._energy)


def _directions(x: np.ndarray, most: int) -> np.ndarray:
    """Fewer vectors, with the largest singular values of all of them and the same directions.

    Reference: Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 3.1.
    """
    _, values, v = randomized_svd(x, most, _ITERATIONS, sketch())
    return values[..., None] * v


def sketch() -> keras.initializers.Initializer:
    """What a randomised SVD begins with: the same at each call."""
    return keras.initializers.RandomNormal(stddev=1.0, seed=_SEED)


def _gradients(tree: Tree, layers: Sequence[PlannedLayer], data: Any) -> dict[str, Measured]:
    """Of each layer, by path, the sum over the batches of the gradient of `W0`."""
    model, sums = tree.root, _Sums()
    sites = {id(x.target.site.matrix): (x.target.path, x.target.site) for x in layers}
    optimizer, function = model.optimizer, model.train_function
    with flags_kept([*tree.layers, *tree.root.variables]):
        let_train(tree, [site.matrix for _, site in sites.values()])
        matrices = model.trainable_variables
        model.optimizer, model.train_function = sums, None
        try:
            for batch in batches_of(data):
                model.train_on_batch(*keras.utils.unpack_x_y_sample_weight(batch))
        finally:
            model.optimizer, model.train_function = optimizer, function
    pairs = [(*sites[id(v)], total) for v, total in zip(matrices, sums.of(matrices), strict=True)]
    stacks = {p: ops.convert_to_numpy(site.split().stacked(total)) for p, site, total in pairs}
    energies = {p: float(np.square(x, dtype="float64").sum()) for p, x in stacks.items()}
    return {p: Measured(x, _finite(energies[p], "gradients", p)) for p, x in stacks.items()}


class _Sums(keras.optimizers.Optimizer):
    """Sums gradients, in the place of an optimizer; the variables stay as they are."""

    def __init__(self) -> None:
        super().__init__(0.0, loss_scale_factor=_LOSS_SCALE, name="gradient_sums")
        self._sums = list[keras.Variable]()

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if not self.built:
            super().build(variables)
            self._sums += [self.add_variable(v.shape, "zeros", "float32") for v in variables]

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        if trainable_variables is not None:
            self.build(trainable_variables)
        for total, gradient in zip(self._sums, grads, strict=True):
            if gradient is not None:
                total.assign_add(ops.cast(gradient, "float32") / _LOSS_SCALE)

    def of(self, variables: Sequence[keras.Variable]) -> list[Any]:
        """The sums in this order, which is that of training; zeros if there were no batches."""
        self.build(variables)
        return list(map(ops.convert_to_tensor, self._sums))
