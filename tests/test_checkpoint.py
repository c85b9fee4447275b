"""`AdapterCheckpoint`: a broken run that goes on ends as an unbroken one does."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support import processes
from support.models import composite, data, functional, state, subclassed

import keras_lora as kl

BATCHES, EPOCHS = 7, 3
CONFIG = kl.LoRAConfig(rank=2, dropout=0.2, layers_to_save=["head"], bias="lora_only")


class BrokenError(Exception):
    pass


class BreakAfter(keras.callbacks.Callback):
    """Stops training as an error in the middle of an epoch does."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left == 0:
            raise BrokenError


class Counter(keras.callbacks.Callback):
    """The epochs that began, and the optimizer's steps when training ended."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.epochs.append(epoch)


def adapted(
    make: Callable[[], keras.Model],
    seed: int = 1,
    optimizer: Any = None,
    config: kl.LoRAConfig = CONFIG,
    **options: Any,
) -> keras.Model:
    """The same base for every seed; other adapters, head and dropout masks."""
    keras.utils.set_random_seed(0)
    model = make()
    keras.utils.set_random_seed(seed)
    kl.apply_lora(model, config)
    metrics = [keras.metrics.MeanAbsoluteError(name="mae")]
    optimizer = optimizer() if optimizer else keras.optimizers.Adam(0.02)
    model.compile(optimizer, "mse", metrics=metrics, **options)
    return model


def fit(model: keras.Model, *callbacks: Any, epochs: int = EPOCHS, **options: Any) -> Any:
    x, y = data(model, 2 * BATCHES)
    defaults = {"batch_size": 2, "shuffle": False, "verbose": 0, "validation_data": (x, y)}
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **(defaults | options))


def trained(model: keras.Model) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables]


def assert_same(received: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def scheduled() -> keras.optimizers.Optimizer:
    return keras.optimizers.AdamW(keras.optimizers.schedules.ExponentialDecay(0.02, 5, 0.5))


def accumulating() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.02, momentum=0.9, gradient_accumulation_steps=2)


def averaging() -> keras.optimizers.Optimizer:
    return keras.optimizers.Nadam(0.02, use_ema=True, ema_overwrite_frequency=4)


def scaled() -> keras.optimizers.Optimizer:
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.02), dynamic_growth_steps=3)


CASES: list[Any] = [
    pytest.param(make, optimizer, freq, after, id=f"{make.__name__}-{name}-{freq}-{after}")
    for make, name, optimizer, freq, after in [
        (functional, "adam", None, "epoch", 10),
        (functional, "adam", None, 3, 2),
        (functional, "scheduled", scheduled, 2, 12),
        (composite, "accumulating", accumulating, 3, 8),
        (composite, "averaging", averaging, "epoch", 15),
        (subclassed, "scaled", scaled, 7, 16),
        (subclassed, "adam", None, 1, 14),
    ]
]


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


def test_a_broken_run_with_dora_goes_on_too(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, use_dora=True)
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


class Logs(keras.callbacks.Callback):
    """Gives the logs of an epoch another value, for callbacks after it."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["val_mae"] = logs["quality"] = self.values[epoch]


@pytest.mark.parametrize(
    ("options", "values", "saved"),
    [
        ({"monitor": "val_mae"}, [3, 1, 2], [1, 2]),
        ({"monitor": "val_mae", "initial_value_threshold": 2.5}, [3, 1, 2], [2]),
        ({"monitor": "val_mae", "mode": "max"}, [3, 1, 4], [1, 3]),
        ({"monitor": "quality", "mode": "max"}, [2, 3, 3], [1, 2]),
        ({"monitor": "quality", "mode": "min"}, [float("nan"), 3, 2], [2, 3]),
        ({"initial_value_threshold": 0.0}, [3, 1, 2], []),
    ],
)
def test_the_best_adapter_stays(
    options: dict[str, Any], values: list[float], saved: list[int], tmp_path: Path
) -> None:
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
            now = (tmp_path / "adapter.safetensors").exists() and (
                kl.read_adapter_files(tmp_path).tensors["up/lora_b"].tobytes()
            )
            seen.append(now)

    checkpoint = kl.AdapterCheckpoint(tmp_path, save_best_only=True, **options)
    fit(adapted(functional), Logs(values), checkpoint, Watch())
    changes = [e for e in range(1, 4) if seen[e - 1] != ([False, *seen])[e - 1]]
    assert changes == saved


def test_the_best_value_is_remembered(tmp_path: Path) -> None:
    def best() -> kl.AdapterCheckpoint:
        return kl.AdapterCheckpoint(tmp_path, monitor="val_mae", save_best_only=True)

    with pytest.raises(BrokenError):
        fit(adapted(functional), Logs([1, 2, 3]), best(), BreakAfter(10))
    before = (tmp_path / "adapter.safetensors").read_bytes()
    checkpoint = best()
    fit(adapted(functional, 2), Logs([0, 2, 3]), checkpoint)
    assert checkpoint.best == 1
    assert (tmp_path / "adapter.safetensors").read_bytes() == before


def test_a_monitor_that_is_not_there_saves_and_warns(tmp_path: Path) -> None:
    checkpoint = kl.AdapterCheckpoint(tmp_path, monitor="nothing", save_best_only=True)
    with pytest.warns(UserWarning, match=r"monitor='nothing' is not among \['loss', 'mae', "):
        fit(adapted(functional), checkpoint, epochs=1)
    assert (tmp_path / "adapter.safetensors").exists()


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


def refusals() -> list[Any]:
    def other_config(model: keras.Model) -> keras.Model:
        kl.unload_lora(model)
        kl.apply_lora(model, kl.LoRAConfig(rank=3, targets=["up"]))
        return model

    def other_optimizer(model: keras.Model) -> keras.Model:
        model.compile("rmsprop", "mse")
        return model

    def not_training(model: keras.Model) -> keras.Model:
        kl.set_adapter(model, "default", trainable=False)
        return model

    def nothing_adapted(model: keras.Model) -> keras.Model:
        return kl.unload_lora(model)

    def twice(model: keras.Model) -> keras.Model:
        model.steps_per_execution = 3
        return model

    # Keras has one step an execution on torch.
    steps = [pytest.param(twice, "a divisor of the 2 batches", id="steps")]
    steps = [] if keras.backend.backend() == "torch" else steps
    return [
        pytest.param(other_config, r"values/up/lora_a: \(5, 2\), expected \(5, 3\)", id="config"),
        pytest.param(other_optimizer, "Adam, expected RMSprop", id="optimizer"),
        pytest.param(not_training, "Expected an adapter that trains", id="frozen"),
        pytest.param(nothing_adapted, "which has none", id="unloaded"),
        *steps,
    ]


@pytest.mark.parametrize(("change", "message"), refusals())
def test_a_state_of_another_run_is_refused_and_nothing_is_changed(
    change: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BrokenError):
        fit(adapted(functional), kl.AdapterCheckpoint(tmp_path, save_freq=2), BreakAfter(3))
    model = change(adapted(functional, 2))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fit(model, kl.AdapterCheckpoint(tmp_path, save_freq=2))
    assert state(model) == before


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenError):
        fit(adapted(functional), kl.AdapterCheckpoint(tmp_path), BreakAfter(3))
    file = tmp_path / "training_state" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(kl.AdapterFileError, match="training_state"):
        fit(adapted(functional), kl.AdapterCheckpoint(tmp_path))


def test_other_data_are_refused_when_they_end_too_early(tmp_path: Path) -> None:
    with pytest.raises(BrokenError):
        fit(adapted(functional), kl.AdapterCheckpoint(tmp_path, save_freq=5), BreakAfter(6))
    model = adapted(functional, 2)
    with pytest.raises(ValueError, match="before the batches that were done"):
        fit(model, kl.AdapterCheckpoint(tmp_path), steps_per_epoch=3)
    before = trained(model)
    fit(model, epochs=1)
    assert any((a != b).any() for a, b in zip(before, trained(model), strict=True))


def test_an_adapter_of_another_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    kl.save_adapter(adapted(functional), tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    with pytest.raises(kl.AdapterFileError, match="adapter without.*overwrite=True"):
        fit(adapted(functional, 2), kl.AdapterCheckpoint(tmp_path), epochs=1)
    assert (tmp_path / "adapter.safetensors").read_bytes() == before
    checkpoint, counter = kl.AdapterCheckpoint(tmp_path, overwrite=True), Counter()
    fit(adapted(functional, 2), checkpoint, counter, epochs=1)
    assert (tmp_path / "adapter.safetensors").read_bytes() != before
    fit(adapted(functional, 2), kl.AdapterCheckpoint(tmp_path, overwrite=True), counter, epochs=1)
    assert counter.epochs == [0, 0]


def test_a_second_fit_with_the_same_callback_trains_on(tmp_path: Path) -> None:
    model, counter, checkpoint = adapted(functional), Counter(), kl.AdapterCheckpoint(tmp_path)
    fit(model, checkpoint, counter, epochs=2)
    fit(model, checkpoint, counter, epochs=1)
    assert counter.epochs == [0, 1, 0]
    other = adapted(functional, 2)
    kl.load_adapter(other, tmp_path, replace=True)
    assert_same(trained(other), trained(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_freq": 0}, "save_freq"),
        ({"save_freq": True}, "save_freq"),
        ({"save_freq": "batch"}, "save_freq"),
        ({"mode": "best"}, "mode"),
        ({"directory": "run-{epoch}"}, "directory"),
    ],
)
def test_invalid_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid {message}|`{message}`|{message}="):
        kl.AdapterCheckpoint(**({"directory": "run"} | options))


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
@pytest.mark.parametrize(("make", "freq"), [("composite", "epoch"), ("functional", "3")])
def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(
    make: str, freq: str, tmp_path: Path
) -> None:
    def run(directory: Path, kill_at: int) -> list[Any] | None:
        process = processes.start(RESUMABLE, make, directory, freq, kill_at)
        output, _ = process.communicate(timeout=600)
        assert process.returncode in (0, -signal.SIGKILL), output
        return json.loads(output.splitlines()[-1]) if process.returncode == 0 else None

    expected = run(tmp_path / "unbroken", 10**6)
    assert expected is not None
    rng = np.random.default_rng(len(freq))
    received, kills = None, 0
    while received is None:
        received = run(tmp_path / "broken", int(rng.integers(12, 60)))
        kills += received is None
    assert kills > 0
    assert_same([np.array(v) for v in received], [np.array(v) for v in expected])
