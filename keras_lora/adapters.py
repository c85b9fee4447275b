"""Which adapters act."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import keras

from keras_lora.config import invalid
from keras_lora.inject import adapted, around, changing, freeze, refresh


def set_adapter(model: keras.Model, names: str | Sequence[str] | None) -> None:
    """Let exactly these adapters act and train; their deltas add up.

    What trains beside adapters (`bias`, `layers_to_save`) goes on training. Compiled functions
    are made anew.

    Args:
        model: An adapted model.
        names: A name, several, or None for the base alone.

    Raises:
        ValueError: no adapters, or a name that the model does not have.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> config = kl.LoRAConfig(targets=["up"], rank=2)
    >>> model = kl.apply_lora(kl.apply_lora(model, config, name="fr"), config, name="de")
    >>> kl.set_adapter(model, "fr")
    >>> kl.lora_layers(model)["up"].active_adapters
    ('fr',)
    """
    layers = adapted(model)
    wanted = [names] if isinstance(names, str) else list(names or ())
    known = sorted({name for layer in layers.values() for name in layer.adapters})
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise invalid("names", f"names among {known}", unknown)
    with changing(model, list(layers.values())):
        ours = {id(v) for layer in layers.values() for v in layer.adapter_variables}
        selected = [v for v in model.trainable_variables if id(v) not in ours]
        for layer in layers.values():
            layer.activate([name for name in wanted if name in layer.adapters])
            for name in layer.active_adapters:
                selected += layer.adapters[name].variables
        freeze(model, selected)


@contextlib.contextmanager
def disable_adapter(model: keras.Model) -> Iterator[keras.Model]:
    """Within the context no adapter acts: the model computes what its base does, bit for bit.

    Args:
        model: An adapted model.

    Yields:
        The same model.

    Raises:
        ValueError: the model has no adapters.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> with kl.disable_adapter(model):
    ...     kl.lora_layers(model)["up"].active_adapters
    ()
    """
    layers = list(adapted(model).values())
    models = around(model, layers)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.disabled())
        refresh(models)
        try:
            yield model
        finally:
            stack.close()
            refresh(models)
