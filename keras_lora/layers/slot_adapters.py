"""`SlotAdapters`: a matrix is computed with the adapters that are in its slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, final

import keras
from keras import ops

from keras_lora.layers.computation import Computation
from keras_lora.layers.kinds import Site
from keras_lora.layers.padding import check_ranks
from keras_lora.layers.slots import Slot, dropped
from keras_lora.layers.token_rows import TokenRows, replaced
from keras_lora.lowrank.equations import Tensor
from keras_lora.lowrank.products import Products, Term

_Seeds: TypeAlias = "keras.random.SeedGenerator | None"


class _Slots(Protocol):
    """What `SlotAdapters` reads of a bank."""

    slots: list[Slot]
    seeds: keras.random.SeedGenerator | None
    squared_norms: keras.Variable | None


@final
class _Drawn(keras.random.SeedGenerator):
    """Seeds that are drawn once. It has no variable, so it calls no constructor of Keras."""

    def __init__(self, seeds: keras.random.SeedGenerator) -> None:
        self._drawn = seeds.next()

    def next(self, ordered: bool = True) -> Tensor:  # noqa: ARG002
        return self._drawn


@final
class SlotAdapters(Computation):
    """The adapters in the slots of a bank: those that `set_adapter` made active, or some of them.

    Args:
        bank: The bank.
        multipliers: What multiplies the scale of each slot that takes part, by the slot's index;
            None for all slots as they are.
        drawn: The seeds of each slot's dropout, once they are drawn.
    """

    def __init__(
        self,
        bank: _Slots,
        multipliers: Mapping[int, float] | None = None,
        drawn: Sequence[_Seeds] | None = None,
    ) -> None:
        self._bank = bank
        self._multipliers = multipliers
        self._drawn = drawn

    @property
    def multipliers(self) -> Mapping[int, float]:
        """What multiplies the scale of each slot that takes part, by the slot's index."""
        every = dict.fromkeys(range(len(self._bank.slots)), 1.0)
        return every if self._multipliers is None else self._multipliers

    @property
    def parts(self) -> list[tuple[Slot, float]]:
        """The slots that take part, and what multiplies the scale of each."""
        return [(self._bank.slots[index], factor) for index, factor in self.multipliers.items()]

    @property
    def low_rank(self) -> list[tuple[Slot, float]]:
        """Those that have factors; a slot of rank 0 has rows of tokens alone."""
        return [(slot, factor) for slot, factor in self.parts if slot.rank]

    @property
    def rows(self) -> list[TokenRows]:
        """The rows of tokens that take part."""
        return [slot.tokens for slot, _ in self.parts if slot.tokens is not None]

    @property
    def changes_output(self) -> bool:
        return bool(self.multipliers)

    def products(self, site: Site, x: Tensor) -> Products:
        return site.products(x)

    def terms(self, site: Site, x: Tensor, training: bool | None) -> Sequence[Term]:
        if training:
            check_ranks(site.layer, self._bank.slots)
        seeds, dtype = self._seeds(training), site.layer.compute_dtype
        split, norms, terms = site.split(len(x.shape)), self._bank.squared_norms, []
        # Read only where a gain needs it: in mixed precision a read casts the matrix.
        matrix = None if norms is None else site.weight()
        for index, factor in self.multipliers.items():
            slot, seed = self._bank.slots[index], seeds[index]
            x_i = x if seed is None else dropped(x, slot.rate, seed)
            a, b, gain = slot.update(split, matrix, norms, site.wide_dtype, factor)
            terms.append(Term(x_i, ops.cast(a, dtype), ops.cast(b, dtype), gain))
        return terms

    def repeatable(self, training: bool | None) -> SlotAdapters:
        drawn = [None if seed is None else _Drawn(seed) for seed in self._seeds(training)]
        return SlotAdapters(self._bank, self._multipliers, drawn)

    def _seeds(self, training: bool | None) -> Sequence[_Seeds]:
        """The seeds of each slot's dropout; None where there is no dropout."""
        if self._drawn is not None:
            return self._drawn
        return [self._bank.seeds if training else None] * len(self._bank.slots)

    def add_bias(self, product: Tensor, bias: Tensor | None) -> Tensor:
        return product if bias is None else ops.add(product, bias)

    def kernel_of(self, site: Site) -> Tensor:
        """Summed in float32, or in the dtype of `W0` where that is wider, and rounded once."""
        if not self.multipliers:
            return ops.cast(site.weight(), site.dtype) if site.is_quantized else site.matrix
        split, dtype, total = site.split(), site.wide_dtype, site.wide_matrix()
        norms = self._bank.squared_norms
        if self.rows:
            total = replaced(self.rows, ops.arange(total.shape[0]), total)
        updates = [slot.update(split, total, norms, dtype, factor) for slot, factor in self.parts]
        cast = [(ops.cast(a, dtype), ops.cast(b, dtype), gain) for a, b, gain in updates]
        return ops.cast(split.effective(total, cast), site.dtype)
