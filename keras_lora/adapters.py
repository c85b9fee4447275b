"""Several adapters on one model: activate, disable, delete, scale and combine them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import keras

from keras_lora.checks import invalid, is_finite
from keras_lora.inject import (
    CHOOSING,
    active_names,
    adapter_names,
    changing,
    check_names,
    computing_scaled,
    computing_with,
    context,
    drop,
    in_trace,
    leaving,
    switch,
    turn,
    unload,
)
from keras_lora.layers import AdapterBank
from keras_lora.walker import Tree


def set_adapter(
    model: keras.Model, names: str | Sequence[str] | None, trainable: bool = True
) -> None:
    """Activate exactly the named adapters, and train them; their deltas add up.

        h = x W0 + sum_i s_i (x A_i) B_i        over the adapters named

    Only values move and nothing is traced again: `predict`, `fit` and `generate` go on with their
    compiled functions, and an inactive adapter adds nothing to the time of a step.
    A new trace is needed only where

    - more adapters are active on a layer than ever before, or one has a higher rank, or is the
      first with dropout or DoRA: the layer then gets new variables;
    - the rank differs at all, and the optimizer does not go by element (Adafactor, Lamb, Muon, and
      classes that are not Keras's): zeros beside an adapter would change its training;
    - other variables of the base train (adapters with other `layers_to_save` or `bias`), or
      `trainable` changes: `fit` (on JAX every function) is then traced again.

    The moments in the optimizers of this model and of models inside it move with the adapters, and
    so does the number of steps, on which schedules depend: an adapter that is trained, then others,
    then the first again, trains as without a break, whatever ranks, heads and layers they have.
    Adapters that are active together share one number of steps, that of the one that was trained
    longest. The learning rate stays. What trains beside the adapters and belongs to none (a layer
    made by hand) keeps moments for each of these adapters. `compile` starts anew, and so does an
    adapter that was replaced. An optimizer class of your own must keep its moments as Keras's do,
    in lists with an entry for each variable; otherwise a warning says when they are lost.

    `fit` and `train_on_batch` see to the ranks. In a training loop of your own, with an optimizer
    that does not go by element, `compile` the model with it before `set_adapter`.

    A layer that none of the named adapters is on keeps an empty slot, which adds zero and gets no
    gradient.

    Args:
        model: An adapted model.
        names: A name, several, or None for the base alone.
        trainable: Whether the adapters train, with their biases and `layers_to_save`.

    Raises:
        ValueError: no adapters, a name that the model does not have, or two adapters that each
            have a value for one variable (a head in the `layers_to_save` of both).

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> config = kl.LoRAConfig(targets=["up"], rank=2)
    >>> model = kl.apply_lora(kl.apply_lora(model, config, name="fr"), config, name="de")
    >>> kl.set_adapter(model, "fr")
    >>> kl.lora_layers(model)["up"].active_adapters
    ('fr',)
    """
    with turn(model, "set_adapter") as tree:
        switch(tree, check_names(tree, names), trainable)


@contextlib.contextmanager
def disable_adapter(model: keras.Model) -> Iterator[keras.Model]:
    """Within the context no adapter is active: the model computes the outputs of its base.

    The outputs equal the base's up to rounding: the empty slots are still computed, so that
    nothing is traced again. No trainable flag and no optimizer changes, and other threads that
    call a verb for this model wait for the end of the context. `fit` of the model is refused
    inside, since it would move the base's own heads and biases.

    In a function that is being traced, such as a `train_step` that needs the outputs of the base
    beside those of the adapted model (DPO, a KL penalty), no value moves: what is traced within the
    context computes the base. Adapters with a head or biases of their own cannot be disabled
    there.

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
    with _with_active(model, None, "disable_adapter"):
        yield model


@contextlib.contextmanager
def use_adapter(model: keras.Model, names: str | Sequence[str] | None) -> Iterator[keras.Model]:
    """Within the context exactly the named adapters are active, and no other thread changes them.

        h = x W0 + sum_i s_i (x A_i) B_i        over the adapters named

    For services: each answer is one adapter's, whatever other threads do. A thread that calls
    another verb of this package for this model, or for a model that shares layers with it, waits
    for the end of the context. As in `disable_adapter` no trainable flag and no optimizer changes,
    and a function that is being traced computes so for good; there the names must be of active
    adapters. Enter and leave it in one thread, with no `await` inside.

    Args:
        model: An adapted model.
        names: A name, several, or None for the base alone.

    Yields:
        The same model.

    Raises:
        ValueError: as `set_adapter`; while a function is traced also where values would have to
            move.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> config = kl.LoRAConfig(targets=["up"], rank=2)
    >>> model = kl.apply_lora(kl.apply_lora(model, config, name="fr"), config, name="de")
    >>> with kl.use_adapter(model, "fr"):
    ...     kl.lora_layers(model)["up"].active_adapters
    ('fr',)
    >>> kl.lora_layers(model)["up"].active_adapters
    ('de',)
    """
    with _with_active(model, names, "use_adapter"):
        yield model


@contextlib.contextmanager
def _with_active(
    model: keras.Model, names: str | Sequence[str] | None, verb: str
) -> Iterator[None]:
    """Within the context exactly the named adapters are active, for this thread alone."""
    with turn(model, verb, CHOOSING, traced=True) as tree:
        wanted = check_names(tree, names)
        with context(tree, verb), computing_with(tree, wanted):
            yield


def delete_adapter(model: keras.Model, name: str) -> None:
    """Take an adapter out: its factors, and its values of biases and `layers_to_save`.

    The other adapters stay active or inactive. If it was the last one, the model is plain again, as
    after `unload_lora`. If some layers have no other adapter, they become plain and compiled
    functions are made anew; otherwise nothing is traced again.

    Args:
        model: An adapted model.
        name: The adapter.

    Raises:
        ValueError: the model has no such adapter.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> config = kl.LoRAConfig(targets=["up"], rank=2)
    >>> model = kl.apply_lora(kl.apply_lora(model, config, name="fr"), config, name="de")
    >>> kl.delete_adapter(model, "de")
    >>> list(kl.lora_layers(model)["up"].adapters)
    ['fr']
    """
    with turn(model, "delete_adapter") as tree:
        _delete(tree, *check_names(tree, [name]))


def _delete(tree: Tree, name: str) -> None:
    if adapter_names(tree) == [name]:
        unload(tree)
        return
    left = [n for n in active_names(tree) if n != name]
    if len(left) < len(active_names(tree)):
        switch(tree, left, any(bank.trains for bank in tree.banks))
    emptied = [x for x in tree.adapted if all(set(b.adapters) <= {name} for b in x.banks.values())]
    with changing(tree, emptied) if emptied else contextlib.nullcontext(), leaving(tree):
        drop(tree, name)


def scale_adapter(
    model: keras.Model, name: str, factor: float
) -> contextlib.AbstractContextManager[None]:
    """Let an adapter count more or less: `h = x W0 + factor * s (x A) B`.

    With DoRA the factor scales `s A B` alone, not the magnitude `m`:
    `W = m (W0 + factor * s A B) / |W0 + factor * s A B|`, as in PEFT.

    The factor lasts; at the end of a `with` statement the old factor returns. Nothing is traced
    again. Merging and saving use the factor. In a function that is being traced the factor counts
    within the `with` statement alone, and for good in what was traced there.

    Args:
        model: An adapted model.
        name: The adapter, active or not.
        factor: A finite number; 1 is the adapter as it was trained, and -1 subtracts its delta.

    Returns:
        A context manager, for a `with` statement at whose end the old factor returns.

    Raises:
        ValueError: the model has no such adapter, or a factor that is not finite.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2, alpha=2))
    >>> with kl.scale_adapter(model, "default", 0.5):
    ...     kl.lora_layers(model)["up"].adapters["default"].scaling
    0.5
    >>> kl.lora_layers(model)["up"].adapters["default"].scaling
    1.0
    """
    with turn(model, "scale_adapter", CHOOSING, traced=True) as tree:
        (name,) = check_names(tree, [name])
        if not is_finite(factor):
            raise invalid("factor", "a finite number", factor)
        if in_trace(tree):
            return computing_scaled(tree, name, float(factor))
        banks = [bank for bank in tree.banks if name in bank.adapters]
        before = [(bank, bank.adapters[name].scale_factor) for bank in banks]
        for bank in banks:
            bank.set_scale_factor(name, float(factor))
        return _scaled(model, name, before)


@contextlib.contextmanager
def _scaled(
    model: keras.Model, name: str, before: Sequence[tuple[AdapterBank, float]]
) -> Iterator[None]:
    """A context manager made once the factor is set; the old factors return at its end."""
    with turn(model, "scale_adapter", CHOOSING):
        try:
            yield
        finally:
            for bank, factor in before:
                if name in bank.adapters:
                    bank.set_scale_factor(name, factor)
