"""Contexts in which other adapters are active, or act by another scale.

Outside a trace their values move into the slots and back, so that compiled functions go on. While a
computation is being recorded nothing can move, and the computation itself is chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from keras_lora.checks import invalid
from keras_lora.inject.standstill import no_training
from keras_lora.inject.switching import activate, active_names, add_slots, away_from_base
from keras_lora.inject.tracing import in_trace
from keras_lora.layers import computing
from keras_lora.walker import Tree


@contextlib.contextmanager
def computing_with(tree: Tree, names: Sequence[str]) -> Iterator[None]:
    """Within the context exactly these adapters are active. No trainable flag changes.

    Raises:
        ValueError: a computation is being recorded, and values would have to move.
    """
    if in_trace(tree):
        _check_chosen(tree, names)
        with _choosing(tree, dict.fromkeys(names, 1.0), named=bool(names)):
            yield
        return
    before = active_names(tree)
    add_slots(tree, names)
    activate(tree, names)
    try:
        with no_training(tree):
            yield
    finally:
        activate(tree, before)


def computing_scaled(
    tree: Tree, name: str, factor: float
) -> contextlib.AbstractContextManager[None]:
    """Within the context, in what is being recorded, the scale factor of an adapter is this one."""
    factors = dict.fromkeys(active_names(tree), 1.0)
    if name in factors:
        present = next(b.adapters[name].scale_factor for b in tree.banks if name in b.adapters)
        if present == 0:
            fix = "set another factor before"
            raise invalid("factor", "an adapter whose present factor is not 0", present, fix)
        factors[name] = factor / present
    return _choosing(tree, factors, named=True)


@contextlib.contextmanager
def _choosing(tree: Tree, factors: Mapping[str, float], named: bool) -> Iterator[None]:
    with computing({bank: bank.choice(factors) for bank in tree.banks}):
        yield
    for bank in tree.banks:
        bank.traced_by_name |= named


def _check_chosen(tree: Tree, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: one of these adapters is not active, or a head would have to change its values.
    """
    active = active_names(tree)
    if not set(names) <= set(active):
        raise invalid(
            "names",
            f"active adapters ({active}) in a function that is being traced",
            list(names),
            "activate them all before: set_adapter(model, [...])",
        )
    moved = away_from_base(tree, names)
    if moved:
        raise ValueError(
            "Expected adapters that differ in their factors alone, in a function that is being "
            f"traced. Received: adapters with values of their own for {moved} (layers_to_save, "
            "bias), which cannot change there. Give the model to be compared its own copy of the "
            "base, or train without these values."
        )
