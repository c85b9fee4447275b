"""What an adapted layer has beside its base.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_trainable_variables`, `_non_trainable_variables`: a layer's variables without those of the
        layers in it, in the order in which Keras stores them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakSet

import keras

from keras_lora.config import AdapterSpec
from keras_lora.layers.bank import AdapterBank
from keras_lora.layers.kinds import Kind, Site
from keras_lora.layers.owned import OwnedValues
from keras_lora.layers.slots import Room

Active: TypeAlias = "tuple[Sequence[str], bool]"  # the names of adapters, and whether they train


@dataclass
class LoRAState:
    """What a layer has that its base class has not. Keras tracks nothing in this object.

    Attributes:
        base_class: The class of the layer without its adapters.
        banks: The adapters of each of the layer's matrices, by the name of the matrix.
        owned: The owned values that a checkpoint of this layer contains for the whole model.
        models: Models that were adapted or switched with this layer in them, whose optimizers
            have moments for its slots.
        pending: Between the constructor and `build`: the specs of the adapters to make.
        pending_active: Likewise: the names of the adapters that will be active.
        pending_room: Likewise: what the slots will have room for; only for `active` if None.
        train_bias: Whether the bias trains once the layer is built.
        checked: While a weights file is checked before it is loaded: what acts in the file, for
            each matrix.
        refusal: Why the last weights file was refused.
        quantize: The plain layer's own `quantize`, which an adapted layer must not have.
    """

    base_class: type
    banks: Mapping[str, AdapterBank]
    owned: list[OwnedValues] = field(default_factory=list)
    models: WeakSet[Any] = field(default_factory=WeakSet)
    pending: dict[str, AdapterSpec] = field(default_factory=dict)
    pending_active: tuple[str, ...] = ()
    pending_room: Room | None = None
    train_bias: bool = False
    checked: list[Active] | None = None
    refusal: str | None = None
    quantize: Any = None

    @classmethod
    def of(
        cls, layer: keras.layers.Layer, base_class: type, kinds: Mapping[str, Kind]
    ) -> LoRAState:
        """The state of a layer without adapters."""
        banks = {name: AdapterBank(Site(layer, kind, name)) for name, kind in kinds.items()}
        return cls(base_class, banks)

    @property
    def frozen(self) -> list[keras.Variable]:
        """What trains with none of the active adapters: of the base, and `A` that is frozen."""
        layer = next(iter(self.banks.values())).site.layer
        if not layer.built:
            return []
        ours = {id(v) for bank in self.banks.values() for v in bank.variables}
        acting = [
            bank.adapters[name].adapter for bank in self.banks.values() for name in bank.active
        ]
        trained = {id(v) for whole in acting if whole is not None for v in whole.trained}
        if self.train_bias:
            trained |= {id(bank.site.bias) for bank in self.banks.values()}
        for bank in self.banks.values():
            ours -= {id(v) for slot in bank.slots for v in slot.factors}
            trained |= {id(v) for v in bank.training()}
        return [v for v in own_weights(layer) if id(v) not in ours | trained]


def own_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The weights of a layer without those of the layers in it."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]
