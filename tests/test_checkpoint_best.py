"""`AdapterCheckpoint` that keeps the best adapter of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.broken_runs import BATCHES, EPOCHS, BreakAfter, BrokenError, adapted, fit
from support.models import functional

import keras_lora as kl


class Logs(keras.callbacks.Callback):
    """Sets a value in the logs of an epoch, for the callbacks that follow."""

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


@pytest.mark.parametrize(("value", "save_best_only"), [(float("nan"), False), (float("inf"), True)])
def test_a_run_that_diverges_keeps_its_last_finite_files(
    value: float, save_best_only: bool, tmp_path: Path
) -> None:
    class Diverge(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
            if epoch == 1:
                variable = self.model.trainable_variables[0]
                variable.assign(variable * value)

    def run(*callbacks: keras.callbacks.Callback) -> keras.Model:
        checkpoint = kl.AdapterCheckpoint(
            tmp_path, monitor="loss", save_best_only=save_best_only, overwrite=True
        )
        model = adapted(functional)
        fit(model, *callbacks, checkpoint)
        return model

    with pytest.warns(UserWarning, match="Training has reached NaN or infinity"):
        run(Diverge())
    assert all(np.isfinite(x).all() for x in kl.read_adapter_files(tmp_path).tensors.values())
    model = run()  # goes on after the first epoch
    assert all(np.isfinite(np.array(v)).all() for v in model.trainable_variables)
    assert int(model.optimizer.iterations) == EPOCHS * BATCHES
