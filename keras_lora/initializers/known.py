"""The starts by name, as `LoRAConfig(init=...)` gives them."""

from __future__ import annotations

from keras_lora.checks import invalid
from keras_lora.initializers.drawn import Gaussian, Lookup, Orthogonal, Uniform
from keras_lora.initializers.measured import EVA, LoftQ, LoRAGA
from keras_lora.initializers.spectral import OLoRA, PiSSA
from keras_lora.initializers.starts import Start

EMBEDDING_START = Lookup()
STARTS: dict[str, Start] = {
    "kaiming_uniform": Uniform(),
    "gaussian": Gaussian(),
    "orthogonal": Orthogonal(),
    "pissa": PiSSA(),
    "olora": OLoRA(),
    "eva": EVA(),
    "lora_ga": LoRAGA(),
    "loftq": LoftQ(),
}
_WITH_ITERATIONS = "pissa"  # may be followed by `:N`


def start_of(init: str) -> Start:
    """The start of this name.

    Raises:
        ValueError: no start has this name.

    Example:

    >>> start_of("pissa:4")
    PiSSA(iterations=4)
    """
    name, _, number = init.partition(":") if isinstance(init, str) else ("", "", "")
    if name == _WITH_ITERATIONS and number.isascii() and number.isdecimal() and int(number):
        return PiSSA(int(number))
    if name not in STARTS or name != init:
        expected = f"one of {(*STARTS, f'{_WITH_ITERATIONS}:N')}, N being a number of iterations"
        raise invalid("init", expected, init)
    return STARTS[name]


def stand_in(start: Start) -> Start:
    """A start in the place of one that costs work, for a layer that gets its values from a file."""
    return Uniform() if start.has_counterpart or start.measures else start
