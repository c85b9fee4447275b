"""The cost of an adapted model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import keras
import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16)
import numpy as np
from rich.console import Console, Group
from rich.text import Text

from keras_lora.inject import adapted, adapter_names, original_flag, whole_adapters
from keras_lora.layers import AdapterBank, Factor
from keras_lora.summary.table import SummaryRow, adapter_tables
from keras_lora.walker import Tree, all_targets

# Adam keeps two moments of each trained parameter, in float32.
_OPTIMIZER_BYTES = 2 * 4


@dataclass(frozen=True)
class Cost:
    """Parameters, and the bytes that training keeps for them."""

    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class LoRASummary:
    """What `lora_summary` prints.

    Attributes:
        rows: One for each adapter of each layer.
        model_parameters: All parameters of the model, adapters included.
        trained: The cost of the variables that train now.
        full: The same for full fine-tuning of the base.
        whole: Whether each of the rows is printed.
        settled: How `"auto"` was settled, by the name of the adapter.
        left: How many layers there are of each kind that could be adapted and of whose family, such
            as the convolutions, no layer is.

    Example:

    >>> cost = Cost(parameters=2, weight_bytes=8, gradient_bytes=8, optimizer_bytes=16)
    >>> LoRASummary([], model_parameters=8, trained=cost, full=cost).share
    0.25
    """

    rows: Sequence[SummaryRow]
    model_parameters: int
    trained: Cost
    full: Cost
    whole: bool = False
    left: Mapping[str, int] = field(default_factory=dict)
    settled: Mapping[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of the model's parameters that trains, in [0, 1]."""
        return self.trained.parameters / self.model_parameters

    def __rich__(self) -> Group:
        return Group(*adapter_tables(self.rows, self.whole), self._caption())

    def _caption(self) -> Text:
        lines = [
            f"trains {self.trained.parameters:,} of {self.model_parameters:,} parameters "
            f"({self.share:.2%})"
        ]
        for name in ("weight", "gradient", "optimizer"):
            ours, theirs = (getattr(cost, f"{name}_bytes") for cost in (self.trained, self.full))
            lines.append(
                f"{name}s trained: {shown_bytes(ours)}; full fine-tuning: {shown_bytes(theirs)}"
            )
        lines += [f"{name}, found: {reason}" for name, reason in self.settled.items()]
        if self.left:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.left.items())
            lines.append(f"not adapted: {kinds}; targets='all' selects these kinds too")
        return Text("\n".join(lines).replace("optimizers trained", "optimizer state (Adam)"))


def lora_summary(
    model: keras.Model, console: Console | None = None, *, whole: bool = False
) -> LoRASummary:
    """Print a table of a model's adapters, and what training costs beside full fine-tuning.

    The table fits on a screen: layers whose paths differ in numbers alone share a row, and a long
    path is shortened in the middle.

    Args:
        model: An adapted model.
        console: Where to print; standard output by default.
        whole: Print a row for each adapter of each layer.

    Returns:
        The figures of the table. Bytes count the variables that train, their gradients and
        Adam's two float32 moments, and no activations.

    Raises:
        ValueError: the model has no adapters.

    Example:

    >>> import keras, keras_lora as kl
    >>> from rich.console import Console
    >>> model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(50, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> summary = kl.lora_summary(model, Console(quiet=True))
    >>> summary.trained.parameters, summary.full.parameters
    (160, 1550)
    """
    summary = _summary(model, whole)
    (Console() if console is None else console).print(summary)
    return summary


def print_trainable_parameters(model: keras.Model) -> None:
    """Print what trains of an adapted model, in one line in the form of PEFT.

    Args:
        model: An adapted model.

    Raises:
        ValueError: the model has no adapters.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(50, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> kl.print_trainable_parameters(model)
    trainable params: 160 || all params: 1,710 || trainable%: 9.3567
    """
    summary = _summary(model)
    print(
        f"trainable params: {summary.trained.parameters:,} || "
        f"all params: {summary.model_parameters:,} || trainable%: {100 * summary.share:.4f}"
    )


def _summary(model: keras.Model, whole: bool = False) -> LoRASummary:
    tree = Tree.of(model)
    banks = adapted(tree)
    rows = [
        SummaryRow(
            path,
            bank.site.layer.base_class.__name__,
            name,
            adapter.spec.rank,
            adapter.scaling,
            name in bank.active,
            adapter.parameters,
            math.prod(bank.site.shape),
        )
        for path, bank in banks.items()
        for name, adapter in bank.adapters.items()
    ]
    ours = {id(v) for bank in banks.values() for v in bank.variables}
    base = [v for v in model.weights if id(v) not in ours]
    adapters = [adapter for bank in banks.values() for adapter in bank.adapters.values()]
    # A counterpart is a part of the model that never trains.
    factors = [factor for adapter in adapters for factor in adapter.named_factors.values()]
    # The factors of adapters, not those of their slots, which may be of a higher rank.
    trained = [f for bank in banks.values() for f in _trained_factors(bank)]
    return LoRASummary(
        rows,
        sum(map(_size, [*base, *factors])),
        _cost([*trained, *(v for v in model.trainable_variables if id(v) not in ours)]),
        _cost([v for v in base if original_flag(v)]),
        whole,
        _left(tree, banks.values()),
        _settled(tree),
    )


def _settled(tree: Tree) -> Mapping[str, str]:
    configs = {n: x.config for n, x in whole_adapters(tree, adapter_names(tree)).items()}
    return {name: config.settled for name, config in configs.items() if config and config.settled}


def _left(tree: Tree, banks: Collection[AdapterBank]) -> Mapping[str, int]:
    adapted_families = {bank.site.kind.family for bank in banks}
    return Counter(
        target.kind
        for target in all_targets(tree)
        if target.site.kind.family not in {*adapted_families, "weight"}
    )


def _trained_factors(bank: AdapterBank) -> list[Factor]:
    names = bank.active if bank.trains else ()
    return [factor for name in names for factor in bank.adapters[name].trained]


def _cost(variables: Sequence[keras.Variable | Factor]) -> Cost:
    parameters = sum(map(_size, variables))
    weights = sum(_size(v) * np.dtype(v.dtype).itemsize for v in variables)
    return Cost(parameters, weights, weights, parameters * _OPTIMIZER_BYTES)


def _size(variable: keras.Variable | Factor) -> int:
    return math.prod(variable.shape)


def shown_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
