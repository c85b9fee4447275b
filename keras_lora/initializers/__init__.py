"""How the factors `A` and `B` of an adapter begin."""

from keras_lora.initializers.known import EMBEDDING_START, STARTS, stand_in, start_of
from keras_lora.initializers.spectral import randomized_svd
from keras_lora.initializers.starts import FrozenMatrix, Initializer, Start, Started

__all__ = [
    "EMBEDDING_START",
    "STARTS",
    "FrozenMatrix",
    "Initializer",
    "Start",
    "Started",
    "randomized_svd",
    "stand_in",
    "start_of",
]
