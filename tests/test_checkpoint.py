"""`AdapterCheckpoint`: a broken run that goes on ends as an unbroken one does."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.broken_runs import (
    BATCHES,
    CASES,
    CONFIG,
    BreakAfter,
    BrokenError,
    Counter,
    adapted,
    assert_same,
    fit,
    trained,
)
from support.forks import Fork
from support.models import functional

import keras_lora as kl

pytest_plugins = ["support.forks"]


@pytest.mark.parametrize(("make", "optimizer", "freq", "after"), CASES)
def test_a_broken_run_goes_on_to_the_weights_and_logs_of_an_unbroken_one(
    make: Callable[[], keras.Model], optimizer: Any, freq: Any, after: int, tmp_path: Path
) -> None:
    def checkpoint() -> kl.AdapterCheckpoint:
        return kl.AdapterCheckpoint(tmp_path, save_freq=freq)

    unbroken = adapted(make, 1, optimizer)
    expected = fit(unbroken).history
    with pytest.raises(BrokenError):
        fit(adapted(make, 1, optimizer), checkpoint(), BreakAfter(after))
    model, counter = adapted(make, 2, optimizer), Counter()
    history = fit(model, checkpoint(), counter).history
    assert_same(trained(model), trained(unbroken))
    done = after if freq == 1 else after // BATCHES * BATCHES if freq == "epoch" else after
    assert counter.epochs[0] >= (done - (0 if freq == "epoch" else int(freq))) // BATCHES
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values[-len(history[name]) :], rtol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"freeze_a": True}])
def test_a_broken_run_with_other_adapters_goes_on_too(
    options: dict[str, Any], tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, **options)
    unbroken, broken, model = (adapted(functional, seed, config=config) for seed in (1, 1, 2))
    fit(unbroken)
    with pytest.raises(BrokenError):
        fit(broken, kl.AdapterCheckpoint(tmp_path, save_freq=3), BreakAfter(10))
    fit(model, kl.AdapterCheckpoint(tmp_path, save_freq=3))
    assert_same(trained(model), trained(unbroken))


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras has neither on torch")
@pytest.mark.parametrize("options", [{"steps_per_execution": 2}, {"jit_compile": True}])
def test_it_goes_on_however_the_model_is_compiled(options: dict[str, Any], tmp_path: Path) -> None:
    unbroken = adapted(functional, **options)
    fit(unbroken)
    with pytest.raises(BrokenError):
        fit(
            adapted(functional, **options),
            kl.AdapterCheckpoint(tmp_path, save_freq=4),
            BreakAfter(6 if "jit_compile" in options else 3),
        )
    model = adapted(functional, 2, **options)
    fit(model, kl.AdapterCheckpoint(tmp_path, save_freq=4))
    assert_same(trained(model), trained(unbroken))


def test_a_run_broken_again_and_again_ends_the_same(tmp_path: Path) -> None:
    unbroken = adapted(functional)
    fit(unbroken)
    for seed in range(1, 20):
        model = adapted(functional, seed)
        try:
            fit(model, kl.AdapterCheckpoint(tmp_path, save_freq=2), BreakAfter(9))
            break
        except BrokenError:
            continue
    assert seed > 2
    assert_same(trained(model), trained(unbroken))


def test_the_saved_adapter_is_that_of_the_model(tmp_path: Path) -> None:
    model = adapted(functional)
    fit(model, kl.AdapterCheckpoint(tmp_path))
    other = adapted(functional, 3)
    kl.load_adapter(other, tmp_path, replace=True)
    assert_same(trained(other), trained(model))


def test_a_run_that_has_ended_is_loaded_and_goes_on_with_more_epochs(tmp_path: Path) -> None:
    unbroken = adapted(functional)
    fit(unbroken)
    first = adapted(functional)
    fit(first, kl.AdapterCheckpoint(tmp_path), epochs=2)
    model, counter = adapted(functional, 2), Counter()
    with pytest.warns(UserWarning, match="has ended"):
        fit(model, kl.AdapterCheckpoint(tmp_path), counter, epochs=2)
    assert counter.epochs == []
    assert_same(trained(model), trained(first))
    fit(model, kl.AdapterCheckpoint(tmp_path), counter)
    assert counter.epochs == [2]
    assert_same(trained(model), trained(unbroken))
    fit(model, counter := Counter())
    assert counter.epochs == [0, 1, 2], "where `fit` starts was for the run that was resumed"


def test_a_run_that_was_stopped_early_stays_so(tmp_path: Path) -> None:
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
            self.model.stop_training = True

    first = adapted(functional)
    fit(first, kl.AdapterCheckpoint(tmp_path, save_freq=2), Stop())
    model, counter = adapted(functional, 2), Counter()
    with pytest.warns(UserWarning, match="has ended"):
        fit(model, kl.AdapterCheckpoint(tmp_path), counter)
    assert counter.epochs == []
    assert_same(trained(model), trained(first))


def test_the_files_do_not_grow_with_the_base(tmp_path: Path) -> None:
    sizes = []
    for width in (5, 509):
        keras.utils.set_random_seed(0)
        inner = [keras.layers.Dense(width, name=f"wide_{i}") for i in range(3)]
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(11, name="up"), *inner])
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"]))
        model.compile("adam", "mse")
        directory = tmp_path / str(width)
        checkpoint = kl.AdapterCheckpoint(directory)
        model.fit(np.ones((2, 5)), np.ones((2, width)), verbose=0, callbacks=[checkpoint])
        files = [file for file in directory.rglob("*") if file.is_file()]
        sizes.append(sum(file.stat().st_size for file in files))
    assert abs(sizes[1] - sizes[0]) < 100


def test_a_second_fit_with_the_same_callback_trains_on(tmp_path: Path) -> None:
    model, counter, checkpoint = adapted(functional), Counter(), kl.AdapterCheckpoint(tmp_path)
    fit(model, checkpoint, counter, epochs=2)
    fit(model, checkpoint, counter, epochs=1)
    assert counter.epochs == [0, 1, 0]
    other = adapted(functional, 2)
    kl.load_adapter(other, tmp_path, replace=True)
    assert_same(trained(other), trained(model))


RESUMABLE = """
import json, os, random, signal, sys
import keras, numpy as np
import keras_lora as kl
from support import models

make, directory, freq, kill_at = sys.argv[1:5]
keras.utils.set_random_seed(0)
model = getattr(models, make)()
config = kl.LoRAConfig(rank=2, dropout=0.2, layers_to_save=["head"])
model = kl.apply_lora(model, config)
model.compile(keras.optimizers.Adam(0.02), "mse")
# Python audits what opens, renames and removes files: a kill there is one within a save.
events = iter(range(int(kill_at)))

def hook(event, arguments):
    touched = event in ("open", "os.rename", "os.remove", "os.mkdir")
    if touched and directory in str(arguments[0]) and next(events, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)

class Kill(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if next(events, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

x, y = models.data(model, 14)
checkpoint = kl.AdapterCheckpoint(directory, save_freq=int(freq) if freq.isdigit() else freq)
options = {"batch_size": 2, "shuffle": False, "epochs": 3, "verbose": 0}
model.fit(x, y, callbacks=[checkpoint, Kill()], **options)
print(json.dumps([v.numpy().tolist() for v in model.trainable_variables]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("make", "freq"), [("one_block", "epoch"), ("functional", "3")])
def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(
    make: str, freq: str, fork: Fork, tmp_path: Path
) -> None:
    def run(directory: Path, kill_at: int) -> list[Any] | None:
        status, output = fork(RESUMABLE, make, directory, freq, kill_at)
        assert status in (0, -signal.SIGKILL), output
        return json.loads(output.splitlines()[-1]) if status == 0 else None

    expected = run(tmp_path / "unbroken", 10**6)
    assert expected is not None
    rng = np.random.default_rng(len(freq))
    received, kills = None, 0
    while received is None:
        received = run(tmp_path / "broken", int(rng.integers(12, 60)))
        kills += received is None
    assert kills > 0
    assert_same([np.array(v) for v in received], [np.array(v) for v in expected])
