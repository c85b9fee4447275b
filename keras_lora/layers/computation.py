"""How an adapted layer computes: with which adapters, and how they act on an input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

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
