"""Ways to start the factors `A` and `B`."""

from __future__ import annotations

import math
from typing import TypeAlias

import keras

from keras_lora.config import AdapterSpec

Initializer: TypeAlias = "keras.initializers.Initializer"


def factor_initializers(
    spec: AdapterSpec, fan_in: int, is_table: bool
) -> tuple[Initializer, Initializer]:
    """How `A` and `B` start, so that `A B = 0`.

    Of a kernel that sums over `fan_in` inputs `A` is random, as `spec.init` says, and `B` is
    zero. Of an embedding's table `A` is zero and `B` is standard normal, as the rows of
    `nn.Embedding` are: a token's row of `A` moves once the token was seen.

    Reference: Hu et al. 2021, section 4.1; the uniform bound is that of PEFT, which is He's
    with a slope of sqrt(5). For embeddings, PEFT and the authors' loralib.
    """
    zeros = keras.initializers.Zeros()
    if is_table:
        return zeros, keras.initializers.RandomNormal(stddev=1.0)
    return _a_initializer(spec, fan_in), zeros


def _a_initializer(spec: AdapterSpec, fan_in: int) -> Initializer:
    if spec.init == "gaussian":
        return keras.initializers.RandomNormal(stddev=1 / spec.rank)
    bound = 1 / math.sqrt(fan_in)
    return keras.initializers.RandomUniform(-bound, bound)
