"""`AdapterCheckpoint`: save an adapter while it trains, and continue a killed run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_lora.checks import AdapterFileError, given_path, invalid, warn
from keras_lora.files.adapter_files import TENSORS_FILE, PathLike
from keras_lora.files.saving import save_adapter
from keras_lora.layers import DEFAULT_ADAPTER
from keras_lora.training.fitting import (
    MODES,
    SkippedBatches,
    check_trains,
    direction_of,
    is_better,
    start_fit_at,
    stop_skipping,
)
from keras_lora.training.run_state import RunState

STATE_DIRECTORY = "training_state"


class AdapterCheckpoint(keras.callbacks.Callback):
    """Saves an adapter while it trains, and lets a run that was killed go on.

    Two things are written, both small however large the base is, and each complete at any moment:

    - in `directory` the adapter, as `save_adapter` writes it. With `save_best_only` it is the best
      one so far;
    - in `directory/training_state` the state of the run: every value that trains, the optimizer,
      the seeds of dropout, the metrics, the epoch and the batch, and the best value so far. It is
      written when training begins, at every save and when training ends.

    When `fit` begins and the directory has such a state, the run goes on from it: a finished
    epoch is not trained again, and in an interrupted epoch the finished batches are read and
    skipped. Only the work since the last save is lost. The final weights are those of an
    uninterrupted run if the data of an epoch come in the same order again: `shuffle=False`, or a
    dataset whose order does not depend on the epochs before. If the run has ended, only its weights
    are loaded, with a warning, unless `fit` is now asked for more epochs.

    Where what trains becomes NaN or infinite, a warning says so, and the files of the last save
    stay.

    Not part of the state: other callbacks (the patience of `EarlyStopping`), and variables that
    change though they are frozen. One directory belongs to one call of `fit`.

    Args:
        directory: The directory to write.
        name: The adapter that is saved. It must be active and train.
        monitor: The name in the logs that decides which is best, such as `"val_loss"`.
        verbose: 1 prints a line for each save.
        save_best_only: Replace the adapter only where `monitor` improved.
        mode: `"min"`, `"max"`, or `"auto"`: what Keras knows of the metric.
        save_freq: `"epoch"`, or a number of batches.
        initial_value_threshold: The value that the first best has to beat.
        overwrite: Start anew where another run has ended, and replace its adapter.

    Raises:
        ValueError: an invalid argument; in `fit`, no adapter of that name, or one that does not
            train; data that end before the batches that were trained.
        AdapterFileError: in `fit`, another run's adapter in the directory, a state of another
            model or optimizer, or damaged files. Nothing is changed then.

    Example:

    >>> import tempfile, keras, numpy as np, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> model.compile("adam", "mse")
    >>> directory = tempfile.mkdtemp()
    >>> checkpoint = kl.AdapterCheckpoint(directory, monitor="loss", save_best_only=True)
    >>> _ = model.fit(np.ones((7, 3)), np.ones((7, 5)), callbacks=[checkpoint], verbose=0)
    >>> kl.read_adapter_config(directory)["spec"]["rank"]
    2
    """

    def __init__(
        self,
        directory: PathLike,
        name: str = DEFAULT_ADAPTER,
        *,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        self.directory = given_path(directory)
        self.name = name
        self.monitor = monitor
        self.verbose = verbose
        self.save_best_only = save_best_only
        self.mode = mode
        self.save_freq = save_freq
        self.best = initial_value_threshold
        self.overwrite = overwrite
        self._own = False  # whether the adapter in the directory is of this run
        self._epoch: int | None = None
        self._unsaved_batches = 0
        self._last_batch = -1
        self._diverged = False
        self._skipped = 0  # batches of this epoch that an earlier process has trained
        self._resumed: RunState | None = None
        self._check_arguments()

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        model = self.model
        stop_skipping(model)  # of a `fit` that was interrupted while it skipped
        check_trains(model, self.name)
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._epoch = None
        state = self._found_state()
        if state is not None:
            self._resume(model, state)
        else:
            self._write_state(epoch=0, batches=0)
        self._own = True

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        start_fit_at(self.model, None)  # the start counts for this `fit` alone
        self._epoch, self._last_batch = epoch, -1
        resumed, self._resumed = self._resumed, None
        self._skipped = 0 if resumed is None else resumed.batches
        if resumed is not None and self._skipped:
            model = self.model
            SkippedBatches(model, self._skipped, lambda: resumed.assign_metrics(model)).start()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        done, self._last_batch = batch - self._last_batch, batch
        if self.save_freq == "epoch" or batch < self._skipped:
            return
        self._unsaved_batches += done
        if self._unsaved_batches >= int(self.save_freq):
            self._save(logs, self._epoch or 0, batch + 1)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._last_batch + 1 < self._skipped:
            stop_skipping(self.model)
            raise ValueError(
                f"Expected the data of the run whose state is in {str(self._state_directory)!r}. "
                f"Received: data that ended in epoch {epoch} before the batches that were trained. "
                "Give the same data, or remove that directory to start anew."
            )
        if self.save_freq == "epoch":
            self._save(logs, epoch + 1, 0)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        start_fit_at(self.model, None)
        if self._epoch is not None and not self._has_diverged():
            self._write_state(self._epoch + 1, 0, ended=self.params["epochs"])

    @property
    def _state_directory(self) -> Path:
        return self.directory / STATE_DIRECTORY

    def _check_arguments(self) -> None:
        if "{" in os.fspath(self.directory):
            raise invalid(
                "directory",
                "a path without '{', since each save replaces the adapter in it",
                self.directory,
                "give each run a directory of its own",
            )
        if self.mode not in MODES:
            raise invalid("mode", f"one of {MODES}", self.mode)
        number = isinstance(self.save_freq, int) and not isinstance(self.save_freq, bool)
        if self.save_freq != "epoch" and not (number and int(self.save_freq) > 0):
            raise invalid("save_freq", "'epoch' or a number of batches", self.save_freq)

    def _found_state(self) -> RunState | None:
        """The state to go on from, or None to start anew."""
        if (self._state_directory / TENSORS_FILE).exists():
            state = RunState.read(self._state_directory)
            anew = state.ended is not None and (self.overwrite or self._own)
            return None if anew else state
        if (self.directory / TENSORS_FILE).exists() and not (self.overwrite or self._own):
            raise AdapterFileError(
                f"Invalid {str(self.directory)!r}: expected a directory without an adapter, or "
                "with the state of its training too. Received: an adapter alone; choose another "
                "directory, or pass overwrite=True to replace it."
            )
        return None

    def _resume(self, model: keras.Model, state: RunState) -> None:
        state.check(model, self._state_directory)
        if state.batches % model.steps_per_execution:
            raise invalid(
                "steps_per_execution",
                f"a divisor of the {state.batches} batches of the epoch that were trained",
                model.steps_per_execution,
                "compile the model as in the interrupted run",
            )
        state.assign(model)
        self.best, self._unsaved_batches, self._resumed = state.best, 0, state
        if state.ended is not None and self.params["epochs"] <= state.ended:
            start_fit_at(model, self.params["epochs"])
            warn(
                f"The run of {str(self.directory)!r} has ended: its weights are loaded, and "
                "nothing is trained. To train anew give another directory, or overwrite=True."
            )
        else:
            start_fit_at(model, state.epoch)
            print(f"{self.directory}: goes on after {state.epoch} epochs, {state.batches} batches")

    def _save(self, logs: Mapping[str, Any] | None, epoch: int, batches: int) -> None:
        """Save the adapter first: otherwise a kill between the two would lose this adapter."""
        self._unsaved_batches = 0
        if self._has_diverged():
            return
        if not self.save_best_only or self._improved(logs or {}):
            save_adapter(self.model, self.directory, self.name, overwrite=True)
            if self.verbose:
                print(f"\nSaved {self.directory} after {epoch} epochs, {batches} batches")
        self._write_state(epoch, batches)

    def _has_diverged(self) -> bool:
        """Whether what trains is no longer finite; then the files of the last save stay."""
        trained = self.model.trainable_variables
        broken = [v.path for v in trained if not bool(ops.all(ops.isfinite(v)))]
        if broken and not self._diverged:
            warn(
                f"Training has reached NaN or infinity, first seen in {broken[0]!r}: "
                f"{str(self.directory)!r} keeps what was saved before. Make the model anew with a "
                "lower learning rate or clipped gradients: `fit` then goes on from there."
            )
        self._diverged = self._diverged or bool(broken)
        return bool(broken)

    def _write_state(self, epoch: int, batches: int, ended: int | None = None) -> None:
        state = RunState.of(self.model, epoch, batches, self.best, ended)
        state.write(self._state_directory)

    def _improved(self, logs: Mapping[str, Any]) -> bool:
        if self.monitor not in logs:
            warn(
                f"The adapter is saved, best or not: monitor={self.monitor!r} is not among "
                f"{sorted(logs)}."
            )
            return True
        value = float(logs[self.monitor])
        direction = partial(direction_of, self.model, self.monitor, self.mode)
        better = is_better(value, self.best, direction)
        if better:
            self.best = value
        return better
