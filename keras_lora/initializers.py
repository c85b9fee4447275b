"""Ways to start the factors `A` and `B`."""

from __future__ import annotations

import math

import keras

from keras_lora.config import AdapterSpec


def a_initializer(spec: AdapterSpec, fan_in: int) -> keras.initializers.Initializer:
    """How `A` starts for a layer that sums over `fan_in` inputs.

    `B` starts at zero whatever this is, so that `A B = 0`.

    Reference: Hu et al. 2021, section 4.1; the uniform bound is that of PEFT, which is He's
    with a slope of sqrt(5).
    """
    if spec.init == "gaussian":
        return keras.initializers.RandomNormal(stddev=1 / spec.rank)
    bound = 1 / math.sqrt(fan_in)
    return keras.initializers.RandomUniform(-bound, bound)
