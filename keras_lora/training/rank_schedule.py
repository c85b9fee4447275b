"""`RankSchedule`: lower the rank while the model still learns."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
from rich.console import Console
from rich.table import Table

from keras_lora.checks import AdapterFileError, given_path, invalid, is_finite
from keras_lora.files.adapter_files import PathLike
from keras_lora.files.atomic import write_files
from keras_lora.files.saving import load_adapter, save_adapter
from keras_lora.inject import parameters_of
from keras_lora.layers import DEFAULT_ADAPTER, goes_by_element
from keras_lora.ranks import check_shrinkable, shrink_adapter, take_ranks
from keras_lora.tables import new_table
from keras_lora.training.fitting import MODES, check_trains, direction_of, is_better
from keras_lora.walker import Tree

STATE_FILE = "rank_schedule.json"
GOOD = "good"
_QUIET = Console(quiet=True)


@dataclass(frozen=True)
class RankTrial:
    """How a size did.

    Attributes:
        epochs: How many epochs of the run were over.
        parameters: The size of all factors.
        ranks: The rank of each layer, by path.
        value: The best value of the metric at this size.
        kept: Whether it held, so that a smaller one was tried next.
    """

    epochs: int
    parameters: int
    ranks: Mapping[str, int]
    value: float
    kept: bool


@dataclass(frozen=True)
class _State:
    """Where the schedule is after an epoch."""

    ranks: Mapping[str, int]
    best: float | None = None  # of all sizes that were kept
    here: float | None = None  # of this size
    epochs_here: int = 0
    ended: bool = False
    trials: tuple[RankTrial, ...] = field(default_factory=tuple)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> _State:
        trials = tuple(RankTrial(**trial) for trial in values["trials"])
        return cls(**{**values, "trials": trials})


class RankSchedule(keras.callbacks.Callback):
    """Lowers the rank of an adapter while a metric holds, and goes back to the last that did.

    The adapter begins at the rank of its config. Each size trains for `patience` epochs. If the
    best value of these is no worse than the best before by more than `tolerance`, the size is
    kept, and `shrink_adapter` makes the best adapter of `factor` times the parameters from it:
    ranks go where they are used. Otherwise the last adapter that was kept returns, and trains on
    for the rest of `fit`, as one of rank 1 does. If `fit` ends first, a size that holds is kept,
    and one that does not, or had no epoch, is taken back.

    Nothing is traced again. After each change the optimizer's moments, and its number of steps,
    begin anew.

    With `directory`, a run that was killed goes on to the weights of an unbroken one: put this
    callback before `AdapterCheckpoint` or `BackupAndRestore`, and fit again with both. What is
    written is small, and whole at any moment.

    Args:
        monitor: The name in the logs that decides, such as `"val_accuracy"`.
        name: The adapter. It must be active and train.
        patience: How many epochs each size gets.
        tolerance: How much worse a smaller adapter may be, in units of the metric.
        factor: How large the next size is, of the present one, in (0, 1).
        mode: `"min"`, `"max"`, or `"auto"`: what Keras knows of the metric.
        directory: Where to keep the last good adapter and the state of the schedule; by default
            in a temporary directory, so that a killed run begins anew.
        verbose: 1 prints each trial, and a table at the end.

    Attributes:
        trials: The record: a `RankTrial` for each size that was tried.

    Raises:
        ValueError: an invalid argument; in `fit`, no adapter of that name or one that does not
            train, DoRA, an optimizer that does not go by element, a name that is not in the logs,
            or a state in `directory` that is not of this run.
        AdapterFileError: in `fit`, a damaged state.

    Example:

    >>> import keras, numpy as np, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((7,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=4))
    >>> model.compile("adam", "mse")
    >>> schedule = kl.RankSchedule("loss", patience=2, tolerance=1.0, verbose=0)
    >>> _ = model.fit(np.ones((7, 7)), np.ones((7, 5)), epochs=6, callbacks=[schedule], verbose=0)
    >>> [(trial.parameters, trial.kept) for trial in schedule.trials]
    [(48, True), (24, True), (12, True)]
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        name: str = DEFAULT_ADAPTER,
        patience: int = 1,
        tolerance: float = 0.0,
        factor: float = 0.5,
        mode: str = "auto",
        directory: PathLike | None = None,
        verbose: int = 1,
    ) -> None:
        super().__init__()
        _check(patience, tolerance, factor, mode)
        self.monitor, self.name, self.mode = monitor, name, mode
        self.patience, self.tolerance, self.factor = patience, tolerance, factor
        self.directory = None if directory is None else given_path(directory)
        self.verbose = verbose
        self._states: dict[int, _State] = {}
        self._state: _State | None = None
        self._epochs = 0
        self._temporary: Path | None = None

    @property
    def trials(self) -> tuple[RankTrial, ...]:
        return self._state.trials if self._state is not None else ()

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        self._check_model()
        if self.directory is None:
            self._temporary = Path(tempfile.mkdtemp())
            # If `fit` breaks, nothing is called at its end.
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        self._states, self._state = self._read(), None

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        if self._state is not None:
            return
        # `fit` begins here: at an epoch before which states of an earlier process may be known.
        known = [epochs for epochs in self._states if epochs <= epoch]
        if known and epoch:
            self._state = self._states[max(known)]
            take_ranks(self.model, self.name, self._state.ranks)
        else:
            self._states, self._state = {}, _State(ranks=self._ranks())
            self._write(epoch)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        value = (logs or {}).get(self.monitor)
        if value is None:
            raise invalid("monitor", f"one of {sorted(logs or {})}", self.monitor)
        assert self._state is not None
        state, self._epochs = self._state, epoch + 1
        if not state.ended:
            here = self._better(state.here, float(value))
            state = dataclasses.replace(state, here=here, epochs_here=state.epochs_here + 1)
            self._state = state if state.epochs_here < self.patience else self._decided(state)
        self._write(epoch + 1)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        state = self._state
        if state is not None and not state.ended:
            if state.epochs_here:
                holds = self._holds(state)
                self._state = self._tried(state, kept=True) if holds else self._taken_back(state)
            elif state.trials:
                self._state = self._returned(state)
            self._write(self._epochs)
        if self.verbose and state is not None:
            Console().print(_table(self.trials, self.monitor))
        if self._temporary is not None:
            shutil.rmtree(self._temporary)
            self._temporary = None

    @property
    def _folder(self) -> Path:
        folder = self._temporary if self.directory is None else self.directory
        assert folder is not None
        return folder

    def _check_model(self) -> None:
        check_trains(self.model, self.name)
        check_shrinkable(Tree.of(self.model), self.name)
        if not goes_by_element(self.model.optimizer):
            optimizer = type(self.model.optimizer).__name__
            fix = "compile with Adam, SGD or another that does"
            raise invalid("optimizer", "one that goes by element", optimizer, fix)

    def _ranks(self) -> dict[str, int]:
        banks = Tree.of(self.model).banks_by_path
        found = {
            p: bank.ordinary(self.name) for p, bank in banks.items() if self.name in bank.adapters
        }
        return {path: adapter.spec.rank for path, adapter in found.items() if adapter.spec.rank}

    def _better(self, one: float | None, other: float) -> float:
        if one is None or math.isnan(one):
            return other
        return other if is_better(other, one, self._upwards) else one

    def _upwards(self) -> bool:
        # Asked after the first epoch: before it Keras does not know the metrics.
        return direction_of(self.model, self.monitor, self.mode)

    def _holds(self, state: _State) -> bool:
        if state.here is None or math.isnan(state.here):
            return False
        if state.best is None:
            return True
        lost = state.best - state.here if self._upwards() else state.here - state.best
        return lost <= self.tolerance

    def _decided(self, state: _State) -> _State:
        """After the last epoch of a size: keep it and try a smaller one, or take it back."""
        if not self._holds(state):
            return self._taken_back(state)
        save_adapter(self.model, self._folder / GOOD, self.name, overwrite=True)
        state = self._tried(state, kept=True)
        size, least = self._size(state.ranks), self._size(dict.fromkeys(state.ranks, 1))
        if size == least:
            return dataclasses.replace(state, ended=True)
        smaller = max(least, int(size * self.factor))
        shrink_adapter(self.model, self.name, parameters=smaller, console=_QUIET)
        return dataclasses.replace(state, ranks=self._ranks(), here=None, epochs_here=0)

    def _taken_back(self, state: _State) -> _State:
        return self._returned(self._tried(state, kept=False))

    def _returned(self, state: _State) -> _State:
        """The last adapter that was kept, if one was; the schedule ends."""
        if any(trial.kept for trial in state.trials):
            load_adapter(self.model, self._folder / GOOD, self.name, replace=True)
        return dataclasses.replace(state, ranks=self._ranks(), ended=True)

    def _tried(self, state: _State, kept: bool) -> _State:
        """With a trial in the record, and its value, if kept, among those to hold."""
        assert state.here is not None
        size = self._size(state.ranks)
        trial = RankTrial(self._epochs, size, state.ranks, state.here, kept)
        best = self._better(state.best, state.here) if kept else state.best
        if self.verbose:
            print(f"\n{size:,} parameters: {self.monitor} {state.here:.4g}, kept: {kept}")
        return dataclasses.replace(state, best=best, trials=(*state.trials, trial))

    def _size(self, ranks: Mapping[str, int]) -> int:
        banks = Tree.of(self.model).banks_by_path
        return sum(parameters_of(banks[path].site, rank) for path, rank in ranks.items())

    def _write(self, epochs: int) -> None:
        assert self._state is not None
        self._states[epochs] = self._state
        if self.directory is None:
            return
        states = {str(number): dataclasses.asdict(state) for number, state in self._states.items()}
        self.directory.mkdir(parents=True, exist_ok=True)
        write_files(self.directory, {STATE_FILE: json.dumps(states, indent=1).encode()})

    def _read(self) -> dict[int, _State]:
        if self.directory is None or not (self.directory / STATE_FILE).exists():
            return {}
        try:
            states = json.loads((self.directory / STATE_FILE).read_text())
            return {int(epochs): _State.of(state) for epochs, state in states.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise AdapterFileError(
                f"Invalid {str(self.directory / STATE_FILE)!r}: expected the state of a "
                f"RankSchedule. Received: {error}. Remove it to start anew."
            ) from error


def _check(patience: Any, tolerance: Any, factor: Any, mode: Any) -> None:
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise invalid("patience", "a positive number of epochs", patience)
    if not is_finite(tolerance) or tolerance < 0:
        raise invalid("tolerance", "a finite number, zero or more", tolerance)
    if not is_finite(factor) or not 0 < factor < 1:
        raise invalid("factor", "a number in (0, 1)", factor, "try factor=0.5")
    if mode not in MODES:
        raise invalid("mode", f"one of {MODES}", mode)


def _table(trials: tuple[RankTrial, ...], monitor: str) -> Table:
    table = new_table(pad_edge=False)
    for heading in ("epochs", "parameters", "ranks", monitor, "kept"):
        table.add_column(heading, justify="right")
    for trial in trials:
        low, high = min(trial.ranks.values()), max(trial.ranks.values())
        ranks = f"{low}" if low == high else f"{low} to {high}"
        numbers = f"{trial.epochs}", f"{trial.parameters:,}", ranks, f"{trial.value:.4g}"
        table.add_row(*numbers, "yes" if trial.kept else "no")
    return table
