"""`memory_plan`: the memory that a training step would take, before anything runs."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16)
import numpy as np
from rich.table import Table

from keras_lora.checks import invalid, is_number
from keras_lora.config import LoRAConfig
from keras_lora.memory.tracing import ACTIVATIONS, GRADIENTS, LOGITS, step_memory
from keras_lora.memory.twin import Changes, nowhere, tensorflow, twin_of
from keras_lora.summary import shown_bytes
from keras_lora.tables import new_table
from keras_lora.walker import Blocks, Tree


@dataclass(frozen=True)
class MemoryRow:
    """A part of the memory of a training step.

    Attributes:
        name: `weights`, `factors`, `optimizer`, `gradients`, `activations` or `logits`.
        bytes: All of it; of activations and logits what is alive at the peak.
        at_peak: What of it is alive when most memory is taken.
    """

    name: str
    bytes: int
    at_peak: int


@dataclass(frozen=True)
class MemoryPlan:
    """What `memory_plan` finds. It prints as a table.

    Attributes:
        rows: The parts.
        batch_shape: `(batch, length)`, or `(batch,)`.

    Example:

    >>> rows = [MemoryRow("weights", 8, 8), MemoryRow("gradients", 4, 0)]
    >>> MemoryPlan(rows, (2,)).peak
    8
    """

    rows: Sequence[MemoryRow]
    batch_shape: tuple[int, ...]
    _planned: Callable[[tuple[int, ...]], MemoryPlan] | None = field(
        default=None, repr=False, compare=False
    )

    @property
    def peak(self) -> int:
        """Bytes, at the moment when most are taken."""
        return sum(row.at_peak for row in self.rows)

    def __getitem__(self, name: str) -> MemoryRow:
        """The row of that name."""
        found = {row.name: row for row in self.rows}
        if name not in found:
            raise invalid("name", f"one of {list(found)}", name)
        return found[name]

    def for_shape(self, batch_shape: Sequence[int]) -> MemoryPlan:
        """The plan for another batch; the model is made no second time."""
        shape = _shape(batch_shape)
        if shape == self.batch_shape:
            return self
        assert self._planned is not None
        return self._planned(shape)

    def largest_batch(self, budget: float) -> int:
        """The largest batch of this length whose peak fits; 0 if not one example does.

        Args:
            budget: Bytes.
        """
        return self._largest(0, budget)

    def largest_length(self, budget: float) -> int:
        """The largest length of this batch whose peak fits; 0 if not one token does.

        Args:
            budget: Bytes.
        """
        if len(self.batch_shape) < 2:
            fix = "plan with batch_shape=(batch, length)"
            raise invalid("batch_shape", "a length beside the batch", self.batch_shape, fix)
        return self._largest(1, budget)

    def _largest(self, axis: int, budget: float) -> int:
        if not is_number(budget) or not 0 < budget < math.inf:
            raise invalid("budget", "a positive number of bytes", budget, "try 16 * 2**30")

        def peak(size: int) -> int:
            shape = list(self.batch_shape)
            shape[axis] = size
            return self.for_shape(shape).peak

        return largest_size(peak, {self.batch_shape[axis]: self.peak}, budget)

    def __rich__(self) -> Table:
        shape = " x ".join(map(str, self.batch_shape))
        title = f"Memory of a training step, predicted for {shape}"
        table = new_table(title=title, show_footer=True)
        table.add_column("", "peak")
        table.add_column("all", "", justify="right")
        table.add_column("at the peak", shown_bytes(self.peak), justify="right")
        for row in self.rows:
            table.add_row(row.name, shown_bytes(row.bytes), shown_bytes(row.at_peak))
        return table


def memory_plan(
    model: keras.Model,
    config: LoRAConfig | None = None,
    batch_shape: Sequence[int] = (1,),
    *,
    optimizer: Any = None,
    loss: Any = None,
    rematerialize: Blocks | None = None,
    chunk_tokens: int | None = None,
    quantized: Any = None,
) -> MemoryPlan:
    """The bytes that a training step would take, before anything runs. The model does not change.

        peak = weights + factors + optimizer + max over the step of what is alive

    A second model of the same config, whose variables have no values, is changed as the arguments
    say. Its training step is traced and gone through operation by operation, which takes seconds
    and no memory for weights or activations. What is predicted is a step of TensorFlow's executor
    (`compile(jit_compile=False)`), without what TensorFlow itself takes (about 100 MiB), and
    without metrics.

    Args:
        model: A built model with one output, adapted or not: a graph of layers that can be made
            from its config, as KerasHub's tasks can.
        config: What `apply_lora` would be given, for a model without adapters; None trains what the
            model trains now.
        batch_shape: `(batch, length)`: the size of the first axis of each input, and that of its
            others that the model leaves open. `(batch,)` if it leaves none open.
        optimizer: As for `compile`; by default the model's own, or else Adam.
        loss: A loss, as for `compile`; by default the model's own, or else
            `SparseCategoricalCrossentropy(from_logits=True)`. Such a loss has integer targets; the
            targets of other losses are like the outputs.
        rematerialize: What `rematerialize` would be given as `blocks`, such as `"auto"`.
        chunk_tokens: What `chunk_logits` would be given as `tokens`.
        quantized: What `model.quantize` would be given: `"int8"`, `"int4"`, or a config for them.

    Returns:
        A row for each part in bytes, `peak`, and the largest batch or length for a budget.

    Raises:
        ValueError: another backend than TensorFlow, a model that cannot be made from its config,
            several outputs, a `config` for a model with adapters, a shape that does not fit, or
            what the verbs refuse.

    Example:

    >>> import keras, keras_lora as kl
    >>> up, head = keras.layers.Dense(500, "gelu", name="up"), keras.layers.Dense(3, name="head")
    >>> model = keras.Sequential([keras.Input((300,)), up, head])
    >>> plan = kl.memory_plan(model, kl.LoRAConfig(rank=2, targets=["up"]), (32,))
    >>> plan["gradients"].bytes == 4 * 2 * (300 + 500)
    True
    >>> plan.largest_batch(plan.peak) >= 32
    True
    """
    tf, shape = tensorflow(), _shape(batch_shape)
    changes = Changes(
        config=config,
        rematerialize=rematerialize,
        chunk_tokens=chunk_tokens,
        quantized=quantized,
    )
    graph = tf.Graph()
    _check_inputs(model, shape)
    chosen = _optimizer(model, optimizer)
    twin = twin_of(model, changes, graph)
    with nowhere(graph):
        settings = {"jit_compile": False, "weighted_metrics": []}
        twin.compile(_made_anew(chosen), _loss(model, loss), **settings)
        twin.optimizer.build(twin.trainable_variables)
    fixed = _fixed_rows(twin)

    def planned(shape: tuple[int, ...]) -> MemoryPlan:
        with nowhere(graph):
            inputs, targets = _specs(tf, twin, shape)
        parts = step_memory(tf, graph, twin, inputs, targets).parts
        return MemoryPlan([*fixed, *_step_rows(twin, parts)], shape, planned)

    return planned(shape)


def _shape(given: Sequence[int]) -> tuple[int, ...]:
    expected, fix = "one or two positive integers (batch, length)", "try batch_shape=(2, 512)"
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) not in (1, 2):
        raise invalid("batch_shape", expected, given, fix)
    if any(isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 1 for n in given):
        raise invalid("batch_shape", expected, given, fix)
    return tuple(map(int, given))


def _check_inputs(model: Any, shape: Sequence[int]) -> None:
    Tree.of(model)
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    if len(outputs) != 1:
        expected = "a graph of layers, built and with one output"
        received = f"{type(model).__name__} with {len(outputs)} outputs of a graph"
        raise invalid("model", expected, received, "plan a task, such as a classifier of it")
    free = any(None in x.shape[1:] for x in model.inputs)
    if free != (len(shape) == 2):
        sizes = [tuple(x.shape) for x in model.inputs]
        expected = f"{'(batch, length)' if free else '(batch,)'} for inputs of {sizes}"
        raise invalid("batch_shape", expected, tuple(shape))


def _optimizer(model: Any, given: Any) -> Any:
    own = getattr(model, "optimizer", None)
    optimizer = keras.optimizers.get(given or own or "adam")
    return type(optimizer), optimizer.get_config()


def _made_anew(chosen: tuple[Any, Mapping[str, Any]]) -> Any:
    optimizer_class, config = chosen
    return optimizer_class.from_config(dict(config))


def _loss(model: Any, given: Any) -> Any:
    own = getattr(model, "loss", None) if getattr(model, "compiled", False) else None
    chosen = given or own or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return keras.losses.get(chosen)


def _specs(tf: Any, twin: Any, shape: Sequence[int]) -> tuple[Any, Any]:
    """Shapes and dtypes of the inputs and the targets of a batch."""

    def spec(x: Any) -> Any:
        sizes = [shape[0], *(shape[-1] if n is None else n for n in x.shape[1:])]
        return tf.TensorSpec(sizes, x.dtype)

    inputs = twin.inputs[0] if isinstance(twin, keras.Sequential) else twin.input
    specs = keras.tree.map_structure(spec, inputs)
    symbols = keras.tree.map_structure(lambda s: keras.KerasTensor(s.shape, s.dtype.name), specs)
    (outputs,) = keras.tree.flatten(twin.compute_output_spec(symbols))
    name = str(getattr(twin.loss, "name", None) or getattr(twin.loss, "__name__", ""))
    if "sparse" in name:
        return specs, tf.TensorSpec(outputs.shape[:-1], "int32")
    return specs, tf.TensorSpec(outputs.shape, outputs.dtype)


def _fixed_rows(twin: keras.Model) -> list[MemoryRow]:
    """What is there all the time."""
    tree = Tree.of(twin)
    factors = [v for bank in tree.banks for v in bank.variables]
    waiting = [
        factor
        for bank in tree.banks
        for name, adapter in bank.adapters.items()
        if name not in bank.active
        for factor in adapter.named_factors.values()
    ]
    ours = {id(v) for v in factors}
    base = [v for v in twin.variables if id(v) not in ours and _is_of(twin, v)]
    sizes = {
        "weights": base,
        "factors": [*factors, *waiting],
        "optimizer": twin.optimizer.variables,
    }
    return [MemoryRow(name, _bytes(values), _bytes(values)) for name, values in sizes.items()]


def _is_of(twin: keras.Model, variable: Any) -> bool:
    metrics = {id(v) for metric in twin.metrics for v in metric.variables}
    return id(variable) not in metrics


def _step_rows(twin: keras.Model, parts: Mapping[str, int]) -> list[MemoryRow]:
    gradients = MemoryRow(GRADIENTS, _bytes(twin.trainable_variables), parts.get(GRADIENTS, 0))
    others = [MemoryRow(n, parts.get(n, 0), parts.get(n, 0)) for n in (ACTIVATIONS, LOGITS)]
    return [gradients, *others]


def _bytes(variables: Iterable[Any]) -> int:
    return sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in variables)


def largest_size(peak: Callable[[int], int], known: dict[int, int], budget: float) -> int:
    """The largest size whose peak fits, for a peak that grows ever faster.

    Between a size that fits and one that does not, the line through both is below the peak: a
    guess by it is halved in towards the size that fits.
    """
    fits = max((n for n, p in known.items() if p <= budget), default=0)
    over = min((n for n, p in known.items() if p > budget), default=0)
    while over == 0 or over - fits > 1:
        size = _guess(known, fits, over, budget)
        known[size] = peak(size)
        if known[size] <= budget:
            fits = size
        else:
            over = size
    return fits


def _guess(known: Mapping[int, int], fits: int, over: int, budget: float) -> int:
    if over == 0:  # each size that is known fits
        return 2 * fits
    if fits == 0:
        return max(1, over // 2)
    share = (budget - known[fits]) / (known[over] - known[fits])
    guess = fits + round(share * (over - fits))
    # Where the peak grows evenly, the answer is next to the guess.
    return min(max(guess, fits + 1), over - 1)
