"""Verbs take turns: in several threads, and inside contexts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.models import data, randomize_adapters, state
from support.switched import CONFIG, CONTEXTS, NAMES, answers, two_adapters

import keras_lora as kl


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    kl.save_adapter(two_adapters(), tmp_path / "saved", "fr")
    return tmp_path / "saved"


# --- Threads ------------------------------------------------------------------------------------


def in_threads(works: Sequence[Callable[[], Any]]) -> None:
    """Run functions side by side, and raise the first error of any of them."""
    errors: list[BaseException] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def times(count: int, work: Callable[[int], Any]) -> Callable[[], None]:
    def repeated() -> None:
        for index in range(count):
            work(index)

    return repeated


def movers(model: keras.Model, saved: Path) -> dict[str, Callable[[int], Any]]:
    """Verbs that move values, each of which leaves the two adapters as they are."""

    def disable(_: int) -> None:
        with kl.disable_adapter(model):
            pass

    def scale(_: int) -> None:
        with kl.use_adapter(model, "de"), kl.scale_adapter(model, "de", 3):
            pass

    def merge(_: int) -> None:
        with kl.use_adapter(model, "de"), kl.merged(model):
            pass

    def combine(index: int) -> None:
        kl.combine_adapters(model, {"fr": 1, "de": 1}, f"sum{index}")
        kl.delete_adapter(model, f"sum{index}")

    return {
        "set_adapter": lambda index: kl.set_adapter(model, NAMES[index % 2]),
        "disable_adapter": disable,
        "scale_adapter": scale,
        "merged": merge,
        "combine_adapters": combine,
        "load_adapter": lambda _: kl.load_adapter(model, saved, "fr", replace=True),
        "save_adapter": lambda i: kl.save_adapter(model, saved.parent / "to", "de", overwrite=True),
    }


def test_verbs_of_several_threads_leave_every_adapter_as_it_was(saved: Path) -> None:
    model = two_adapters()
    kl.save_adapter(model, saved, "fr", overwrite=True)
    expected = answers(model)
    in_threads([times(12, work) for work in movers(model, saved).values()])
    for name in NAMES:
        kl.set_adapter(model, name)
        np.testing.assert_allclose(model(data(model)[0]), expected[name], atol=1e-5)
    kl.unload_lora(model)
    np.testing.assert_allclose(model(data(model)[0]), expected[""], atol=1e-5)


def test_each_answer_is_of_the_adapter_that_was_asked_for(saved: Path) -> None:
    model = two_adapters()
    kl.save_adapter(model, saved, "fr", overwrite=True)
    expected, x = answers(model), data(model)[0]
    model.predict_on_batch(x)

    def ask(name: str, _: int) -> None:
        with kl.use_adapter(model, name or None):
            answer = model.predict_on_batch(x)
        np.testing.assert_allclose(answer, expected[name], atol=1e-5)

    asking = [times(25, partial(ask, name)) for name in expected]
    in_threads([*asking, *(times(8, work) for work in movers(model, saved).values())])


def test_models_that_share_a_layer_take_turns() -> None:
    shared = keras.layers.Dense(7, name="shared")
    models = []
    for name in ("one", "two"):
        inputs = keras.Input((5,))
        models.append(keras.Model(inputs, keras.layers.Dense(3, name=name)(shared(inputs))))
    for name in NAMES:
        kl.apply_lora(models[0], kl.LoRAConfig(rank=2, targets=["shared"]), name=name)
    randomize_adapters(models[0])
    x, expected = np.ones((2, 5), "float32"), {}
    for name in NAMES:
        kl.set_adapter(models[0], name)
        expected[name] = np.array(shared(x))

    def switch(model: keras.Model, index: int) -> None:
        kl.set_adapter(model, NAMES[index % 2])

    in_threads([times(60, partial(switch, model)) for model in models])
    for name in NAMES:
        kl.set_adapter(models[1], name)
        np.testing.assert_array_equal(np.array(shared(x)), expected[name])


def test_a_verb_waits_for_no_other_model() -> None:
    first, second = two_adapters(), two_adapters()
    with kl.merged(first):
        in_threads([lambda: kl.set_adapter(second, "de")])
    assert kl.lora_layers(second)["up"].active_adapters == ("de",)


def test_another_thread_waits_for_the_end_of_a_context() -> None:
    model, entered, seen = two_adapters(), threading.Event(), list[tuple[str, ...]]()

    def switch() -> None:
        entered.set()
        kl.set_adapter(model, "de")

    with kl.use_adapter(model, None):
        thread = threading.Thread(target=switch)
        thread.start()
        entered.wait()
        seen.append(kl.lora_layers(model)["up"].active_adapters)
    thread.join()
    assert seen == [()]
    assert kl.lora_layers(model)["up"].active_adapters == ("de",)


def test_loading_leaves_threads_without_keras_alone(saved: Path) -> None:
    """A thread that makes a tuple fails if something else refers to the tuple."""
    model, stop = two_adapters(), threading.Event()

    def make_tuples() -> None:
        while not stop.is_set():
            tuple(str(i) for i in range(2000))

    def load() -> None:
        try:
            for index in range(20):
                kl.load_adapter(model, saved, f"a{index}")
        finally:
            stop.set()

    in_threads([make_tuples, load])


# --- Contexts -----------------------------------------------------------------------------------


def entered(context: Callable[[keras.Model], Any]) -> Callable[[keras.Model, Path], None]:
    def enter(model: keras.Model, _: Path) -> None:
        with context(model):
            model(data(model)[0])

    return enter


VERBS: dict[str, Callable[[keras.Model, Path], Any]] = {
    "set_adapter": lambda model, _: kl.set_adapter(model, "de"),
    "apply_lora": lambda model, _: kl.apply_lora(model, CONFIG, name="it"),
    "load_adapter": lambda model, saved: kl.load_adapter(model, saved, "es"),
    "load_adapter, replace": lambda model, saved: kl.load_adapter(model, saved, "fr", replace=True),
    "delete_adapter": lambda model, _: kl.delete_adapter(model, "fr"),
    "combine_adapters": lambda model, _: kl.combine_adapters(model, {"fr": 1, "de": 2}, "sum"),
    "merge_lora": lambda model, _: kl.merge_lora(model),
    "merge_lora to a copy": lambda model, _: kl.merge_lora(model, inplace=False),
    "unload_lora": lambda model, _: kl.unload_lora(model),
    "save_adapter": lambda model, saved: kl.save_adapter(model, saved, "fr", overwrite=True),
    **{name: entered(context) for name, context in CONTEXTS.items()},
}
CHANGES_NOTHING = {"merge_lora to a copy", "save_adapter", *CONTEXTS}


@pytest.mark.parametrize("context", ["merged", "disable_adapter", "use_adapter"])
def test_inside_a_context_what_changes_adapters_is_refused(context: str, saved: Path) -> None:
    model = two_adapters()  # one for all verbs, since none may change it
    before, expected = state(model), answers(model)
    for verb, call in VERBS.items():
        refusals = []
        with CONTEXTS[context](model):
            try:
                call(model, saved)
            except ValueError as error:
                refusals.append(str(error))
        has_none = context == "disable_adapter" and verb in ("merged", "merge_lora to a copy")
        refused = context == "merged" or verb not in CHANGES_NOTHING or has_none
        assert len(refusals) == refused, verb
        assert all(context in text or "at least one active" in text for text in refusals), verb
        assert state(model) == before, verb
    kl.unload_lora(model)
    np.testing.assert_array_equal(model(data(model)[0]), expected[""])


def test_the_base_comes_back_whatever_happens_while_merged() -> None:
    model = two_adapters()
    layers = {path: np.array(x.base_kernel) for path, x in kl.lora_layers(model).items()}

    def fail() -> None:
        with kl.merged(model):
            for variable in model.weights:
                variable.assign(variable + 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    for path, layer in kl.lora_layers(model).items():
        np.testing.assert_array_equal(layer.base_kernel, layers[path])
