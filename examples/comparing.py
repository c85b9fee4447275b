"""Ways to fine-tune one model, each at its own learning rate, compared over seeds."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.numpy import save_file
from training import BATCH, Steps, argument_parser, megabytes, positive

import keras_lora as kl


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. `sweep` has the validation score of each learning rate, at seed 0."""

    name: str
    prepare: Callable[[keras.Model], object]
    sweep: Mapping[float, float]


def train_everything(model: keras.Model) -> None:
    """Full fine-tuning, as the `prepare` of a method."""
    model.trainable = True


@dataclass(frozen=True)
class Measure:
    """What a score is, how it is printed, and which of several is best: `max` or `min`."""

    name: str
    form: str
    best: Callable[..., float]

    def learning_rate(self, method: Method) -> float:
        return self.best(method.sweep, key=method.sweep.__getitem__)

    def of(self, scores: Sequence[float]) -> str:
        """The mean, and the single values if there are several."""
        mean, *values = (self.form.format(x) for x in (statistics.mean(scores), *scores))
        return f"{mean} ({', '.join(values)})" if len(values) > 1 else mean


@dataclass(frozen=True)
class Outcome:
    """The result of one run. `saved_bytes` is the size of a file with all trained values."""

    score: float
    trainable: int = 0
    step_seconds: float = 0.0
    saved_bytes: int = 0


class Plain:
    """One model without adapters, compiled once, that answers for every method's model."""

    def __init__(self, model: keras.Model, jit: bool = True) -> None:
        self._model = model
        self._model.compile(jit_compile=jit)

    def like(self, model: keras.Model) -> keras.Model:
        """The plain model with the values of `model`, whose adapters are merged as for serving."""
        plain = kl.merge_lora(model, inplace=False) if kl.lora_layers(model) else model
        self._model.set_weights(plain.get_weights())
        return self._model


@dataclass(frozen=True)
class Study:
    """Trains all methods on the same rows, and scores them on others.

    `base` makes a compiled model with pretrained values, and a head that depends on Keras's seed.
    `batches` makes the rows of a seed.
    """

    title: str
    base: Callable[[], keras.Model]
    methods: Sequence[Method]
    batches: Callable[[int], tf.data.Dataset]
    score: Callable[[keras.Model], float]
    measure: Measure
    steps: int
    folder: Path
    progress: Progress

    def untrained(self, seed: int) -> Outcome:
        keras.utils.set_random_seed(seed)
        return Outcome(self.score(self.base()))

    def trainee(self, method: Method) -> keras.Model:
        """A model that is ready for every run of a method, so that it compiles only once."""
        model = self.base()
        method.prepare(model)
        return model

    def run(self, model: keras.Model, method: Method, rate: float, seed: int) -> Outcome:
        """Train `model`, which is `trainee(method)`, from the start of this seed."""
        keras.utils.set_random_seed(seed)
        restart(model, self.trainee(method))
        title = f"{method.name}, learning rate {rate:g}, seed {seed}"
        steps = Steps(rate, self.steps, self.progress, title)
        model.fit(self.batches(seed), shuffle=False, verbose=0, callbacks=[steps])
        outcome = Outcome(
            score=self.score(model),
            trainable=sum(int(np.prod(v.shape)) for v in model.trainable_variables),
            step_seconds=steps.median,
            saved_bytes=save_trained(model, self.folder / f"{method.name}.safetensors"),
        )
        score = self.measure.of([outcome.score])
        self.progress.console.print(f"{title}: {self.measure.name} {score}")
        return outcome


def restart(model: keras.Model, fresh: keras.Model) -> None:
    """Give a model the values of a new one, dropout seeds too; clear the optimizer."""
    for variable, value in zip(model.variables, fresh.variables, strict=True):
        variable.assign(value)
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros(variable.shape, variable.dtype))


def save_trained(model: keras.Model, path: Path) -> int:
    """Write the variables that train, by path; returns the bytes of the file."""
    save_file({v.path: keras.ops.convert_to_numpy(v) for v in model.trainable_variables}, path)
    return path.stat().st_size


def sweep(study: Study, console: Console) -> None:
    table = Table("method", "learning rate", f"validation {study.measure.name}", title="Seed 0")
    for method in study.methods:
        model = study.trainee(method)
        for rate in method.sweep:
            score = study.run(model, method, rate, seed=0).score
            table.add_row(method.name, f"{rate:g}", f"{score:.4f}")
    console.print(table)


def compare(
    study: Study, seeds: int, console: Console, others: Mapping[str, float] | None = None
) -> dict[str, keras.Model]:
    """Print one row for each method, after the scores of `others`, which do not train.

    Returns the models of the methods, as the last seed has trained them.
    """
    outcomes = {name: [Outcome(score)] for name, score in (others or {}).items()}
    outcomes["before training"] = [study.untrained(seed) for seed in range(seeds)]
    models = {method.name: study.trainee(method) for method in study.methods}
    for method in study.methods:
        rate = study.measure.learning_rate(method)
        outcomes[method.name] = [
            study.run(models[method.name], method, rate, seed) for seed in range(seeds)
        ]
    console.print(comparison(study, outcomes, seeds))
    return models


def comparison(study: Study, outcomes: Mapping[str, Sequence[Outcome]], seeds: int) -> Table:
    runs_of = f"mean of {seeds} seeds" if seeds > 1 else "seed 0"
    table = Table(title=f"{study.title}, {runs_of}")
    table.add_column("method")
    for heading in (f"test {study.measure.name}", "trainable", "step", "saved"):
        table.add_column(heading, justify="right")
    for name, runs in outcomes.items():
        first = runs[0]
        trained = [
            f"{first.trainable:,}",
            f"{1000 * statistics.median(run.step_seconds for run in runs):,.0f} ms",
            megabytes(first.saved_bytes),
        ]
        score = study.measure.of([run.score for run in runs])
        table.add_row(name, score, *(trained if first.trainable else []))
    return table


def report(
    study: Study,
    options: argparse.Namespace,
    console: Console,
    others: Mapping[str, float] | None = None,
) -> dict[str, keras.Model]:
    """Print the sweep or the comparison, and what the adapters are; returns compared models."""
    if options.sweep:
        sweep(study, console)
        return {}
    models = compare(study, options.seeds, console, others)
    kl.lora_summary(models[study.methods[0].name], console)
    return models


def add_options(parser: argparse.ArgumentParser, seeds: int) -> None:
    """The options of a comparison."""
    parser.add_argument("--seeds", type=positive, default=seeds, help=f"of each method; {seeds}")
    parser.add_argument(
        "--sweep", action="store_true", help="try learning rates, on validation rows"
    )


def comparison_options(
    documentation: str | None,
    steps: int,
    quick_steps: int,
    arguments: Sequence[str] | None,
    batch: int = BATCH,
) -> argparse.Namespace:
    """The options of an example that compares three seeds, or with `--quick` few steps of one."""
    parser = argument_parser(documentation, steps, batch)
    add_options(parser, seeds=3)
    parser.add_argument("--quick", action="store_true", help="few steps: only whether all works")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.seeds = quick_steps, 1
    return options
