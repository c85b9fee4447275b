"""How much electricity will a country use tomorrow? LoRA on an LSTM, from Portugal to Australia.

    python examples/time_series.py            # three seeds
    python examples/time_series.py --sweep    # how the learning rates were chosen
    python examples/time_series.py --quick    # few steps, one seed: only whether everything works

An LSTM is trained on three years of hours of customers in Portugal (once; its weights are kept
beside the data). It reads a week, a day at a time, and forecasts in what the next day
differs from the last one.
Then it learns the demand of Victoria, where the seasons are the other way round, from eight weeks
of it: by low-rank adapters of both kernels of the LSTM's cell, by full fine-tuning, and by
training of the last layer alone, which trains in all three. The test is the mean absolute error
over the nine weeks that follow the validation weeks.

Downloads 35 MB on the first run (see `assets.py`).
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

with silenced():
    import keras

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import assets
import numpy as np
from comparing import (
    Measure,
    Method,
    Plain,
    Study,
    comparison_options,
    report,
    train_everything,
)
from rich.console import Console
from rich.progress import Progress
from training import (
    Steps,
    batches,
    compile_for_training,
    output_folder,
    progress_bars,
)

import keras_lora as kl

DAY, WEEK = 24, 7 * 24
# Hours between the forecasts that are scored.
EVERY = 6
UNITS = 128
BATCH = 64
STEPS, QUICK_STEPS = 300, 3
BASE_STEPS, BASE_RATE = 3000, 3e-3
TRAIN_WEEKS, VALIDATION_WEEKS, TEST_WEEKS = 8, 4, 9
SCORED_AT_ONCE = 36
CONFIG = kl.LoRAConfig(
    rank=8,
    alpha=16,
    targets="all",
    layers_to_save=["hours"],
)


@dataclass(frozen=True)
class Windows:
    """Weeks, as rows of days of hours, and the days that follow them."""

    weeks: np.ndarray
    days: np.ndarray

    @classmethod
    def of(cls, hours: np.ndarray, every: int = 1) -> Windows:
        both = np.lib.stride_tricks.sliding_window_view(hours, WEEK + DAY)[::every]
        return cls(
            both[:, :WEEK].reshape(-1, WEEK // DAY, DAY).astype("float32"),
            both[:, WEEK:].astype("float32"),
        )

    def error(self, forecast: np.ndarray) -> float:
        return float(np.abs(forecast - self.days).mean())


@dataclass(frozen=True)
class Demand:
    """Hours in units of the deviation of the training hours, and this unit."""

    train: Windows
    validation: Windows
    test: Windows
    megawatts: float


def demand() -> Demand:
    hours = assets.victoria()
    first, last = TRAIN_WEEKS * WEEK, (TRAIN_WEEKS + VALIDATION_WEEKS) * WEEK
    end = last + TEST_WEEKS * WEEK
    mean, deviation = hours[:first].mean(), hours[:first].std()
    scaled = (hours - mean) / deviation
    return Demand(
        Windows.of(scaled[:first]),
        # Each part is forecast from the week before it on.
        Windows.of(scaled[first - WEEK : last], every=EVERY),
        Windows.of(scaled[last - WEEK : end], every=EVERY),
        float(deviation),
    )


def forecaster() -> keras.Model:
    """A model that adds a correction to the last day of the week that it reads."""
    week = keras.Input((WEEK // DAY, DAY))
    state = keras.layers.LSTM(UNITS, name="lstm")(week)
    correction = keras.layers.Dense(DAY, name="hours")(state)
    return keras.Model(week, correction + week[:, -1])


def pretrained(steps: int, progress: Progress) -> Path:
    """The file of weights of a forecaster that Portugal has trained."""

    def make(workspace: Path) -> Path:
        keras.utils.set_random_seed(0)
        model, hours = forecaster(), assets.portugal()
        compile_for_training(model, loss="mae")
        rows = Windows.of((hours - hours.mean()) / hours.std())
        bar = Steps(BASE_RATE, steps, progress, "Portugal")
        model.fit(
            batches(rows.weeks, rows.days, steps, 0, BATCH),
            shuffle=False,
            verbose=0,
            callbacks=[bar],
        )
        folder = workspace / "trained"
        folder.mkdir()
        model.save_weights(folder / "base.weights.h5")
        return folder

    return assets.cached(f"portugal-{UNITS}-{steps}", make) / "base.weights.h5"


def pretrained_copy(weights: Path) -> keras.Model:
    model = forecaster()
    model.load_weights(weights)
    compile_for_training(model, loss="mae")
    return model


def adapt(model: keras.Model) -> None:
    kl.apply_lora(model, CONFIG)


def train_head(model: keras.Model) -> None:
    model.get_layer("lstm").trainable = False


# The errors are those of `--sweep`, on one H200 with JAX.
METHODS = (
    Method("LoRA", adapt, {3e-4: 600.6, 1e-3: 762.9, 3e-3: 800.9, 1e-2: 766.0}),
    Method(
        "full fine-tuning", train_everything, {1e-4: 602.4, 3e-4: 640.2, 1e-3: 771.6, 3e-3: 757.9}
    ),
    Method("head only", train_head, {1e-3: 599.5, 3e-3: 584.7, 1e-2: 583.2, 3e-2: 620.3}),
)


def study(
    data: Demand,
    scored: Windows,
    base: Callable[[], keras.Model],
    steps: int,
    outputs: tuple[Path, Progress],
) -> Study:
    plain = Plain(forecaster())

    def error(model: keras.Model) -> float:
        days = plain.like(model).predict(scored.weeks, batch_size=SCORED_AT_ONCE, verbose=0)
        return data.megawatts * scored.error(days)

    return Study(
        title="Demand of Victoria, megawatts",
        base=base,
        methods=METHODS,
        batches=lambda seed: batches(data.train.weeks, data.train.days, steps, seed, BATCH),
        score=error,
        measure=Measure("error", "{:.1f}", min),
        steps=steps,
        folder=outputs[0],
        progress=outputs[1],
    )


def naive(windows: Windows, megawatts: float) -> dict[str, float]:
    """The errors of forecasts that need no model."""
    return {
        "as a week before": megawatts * windows.error(windows.weeks[:, 0]),
        "as the day before": megawatts * windows.error(windows.weeks[:, -1]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = comparison_options(__doc__, STEPS, QUICK_STEPS, arguments, BATCH)
    console, started = Console(), time.perf_counter()
    data = demand()
    scored = data.validation if options.sweep else data.test
    with output_folder(options.out) as folder, progress_bars(console) as progress:
        weights = pretrained(QUICK_STEPS if options.quick else BASE_STEPS, progress)
        base = functools.partial(pretrained_copy, weights)
        methods = study(data, scored, base, options.steps, (folder, progress))
        report(methods, options, console, naive(scored, data.megawatts))
    console.print(f"{time.perf_counter() - started:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
