"""How an adapted layer computes: with which adapters, and how they act on an input."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from keras_lora.layers.kinds import Site
from keras_lora.lowrank.equations import Tensor
from keras_lora.lowrank.products import Products, Term


class Computation(ABC):
    """Abstract: which adapters a matrix is computed with, and how.

    A layer computes with the adapters in its slots (`SlotAdapters`) or, while a SavedModel for
    many adapters is traced, with one for each row of a batch (`MixedBatch`).
    """

    @property
    @abstractmethod
    def changes_output(self) -> bool:
        """False where the layer computes what its base does, bit for bit."""

    @abstractmethod
    def products(self, site: Site, x: Tensor) -> Products:
        """How the matrix, and the updates of its adapters, act on `x`."""

    @abstractmethod
    def terms(self, site: Site, x: Tensor, training: bool | None) -> Sequence[Term]:
        """What the adapters add."""

    @abstractmethod
    def repeatable(self, training: bool | None) -> Computation:
        """The same for one call of a layer that may be computed again: random numbers are drawn."""

    @abstractmethod
    def add_bias(self, product: Tensor, bias: Tensor | None) -> Tensor:
        """`product + bias`, or the product of a layer without bias."""

    @abstractmethod
    def kernel_of(self, site: Site) -> Tensor:
        """The effective matrix `W`, in the dtype of `W0`."""


# The computations that a thread has chosen, by bank. Other threads go on with their own.
_CHOSEN: ContextVar[Mapping[Any, Computation]] = ContextVar(
    "chosen_computations", default=MappingProxyType({})
)


def chosen(bank: Any, otherwise: Computation) -> Computation:
    """The computation that `computing` chose for a bank in this thread."""
    return _CHOSEN.get().get(bank, otherwise)


def all_chosen() -> Mapping[Any, Computation]:
    """All that `computing` chose in this thread."""
    return _CHOSEN.get()


@contextlib.contextmanager
def computing(computations: Mapping[Any, Computation]) -> Iterator[None]:
    """Within the context, in this thread alone, the matrices of these banks are computed so.

    Nothing moves: a function that is traced within the context keeps the choice, and functions
    that were traced before it do not see the choice.
    """
    token = _CHOSEN.set({**_CHOSEN.get(), **computations})
    try:
        yield
    finally:
        _CHOSEN.reset(token)
