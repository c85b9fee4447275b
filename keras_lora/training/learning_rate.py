"""`suggest_learning_rate`: a learning rate from short trials."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from keras_lora.checks import invalid, is_finite, warn
from keras_lora.distribution import strategy_scope
from keras_lora.inject import batches_of, check_batches, left_as_it_was, turn
from keras_lora.layers import parts_of
from keras_lora.pictures import new_figure, write_figure
from keras_lora.tables import new_table

# Two for each factor of ten, about as far apart as the loss tells them.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class RateTrial:
    """How a learning rate did.

    Attributes:
        rate: The learning rate.
        losses: The loss of each step, on a batch that was not trained on before it.
        loss: The mean of the second half of these; infinite if one is not finite.
    """

    rate: float
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        later = self.losses[len(self.losses) // 2 :]
        return float(np.mean(later)) if np.isfinite(self.losses).all() else math.inf


@dataclass(frozen=True)
class RateReport:
    """What `suggest_learning_rate` returns.

    Attributes:
        trials: One for each rate that was tried, the lowest first.
    """

    trials: Sequence[RateTrial]

    @property
    def best(self) -> RateTrial:
        return min(self.trials, key=lambda trial: trial.loss)

    @property
    def learning_rate(self) -> float:
        """The rate with the lowest loss."""
        return self.best.rate

    def __rich__(self) -> Table:
        table = new_table(pad_edge=False)
        for heading in ("learning rate", "first loss", "loss"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for trial in self.trials:
            numbers = f"{trial.rate:.1e}", f"{trial.losses[0]:.4f}", f"{trial.loss:.4f}"
            table.add_row(*numbers, "lowest" if trial is self.best else "")
        return table


def suggest_learning_rate(
    model: keras.Model,
    data: Any,
    *,
    rates: Sequence[float] = RATES,
    steps: int = 24,
    plot: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> RateReport:
    """Try learning rates on the first batches, and say with which the loss is lowest.

        v_(i+1) = optimizer(v_i, batch_i, rate)
        loss(rate) = mean of loss(v_i, batch_i) over the second half of n steps

    Each rate trains for `n = steps` steps from the present values, on the same batches in the same
    order, with the compiled loss and optimizer. No batch comes twice if the data has `n`, so each
    loss is one on rows that were not trained on. Rates are tried from the lowest on; once one ends
    with a loss above that of the first step, or one that is not finite, larger ones are left out.

    Afterwards the model is as before, bit for bit: values, states, seeds, and the optimizer with
    its moments and its rate. Compile with the rate that is suggested, or let a schedule rise to it.
    It suits a run of some hundred steps; one of many thousands may want half of it.

    Args:
        model: A compiled model, adapted or not. What trains in `fit` trains here.
        data: Batches, as a dataset gives them to `fit`.
        rates: What to try.
        steps: How many steps `n` each rate gets.
        plot: Where to write a picture of the loss by rate; the end of the name says of which kind,
            such as `rates.png`. Needs the extra `plot`.
        console: Where to show progress and print the table; standard output by default.

    Returns:
        The figures of the table: `report.trials`, and `report.learning_rate`.

    Raises:
        ValueError: a model that is not compiled or where nothing trains, a schedule in the
            optimizer, rates that are not positive, data without batches or of no such form, or no
            rate with a finite loss.
        ImportError: a plot, and matplotlib is not installed.

    Example:

    >>> import keras, numpy as np, keras_lora as kl
    >>> from rich.console import Console
    >>> model = keras.Sequential([keras.Input((7,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> model.compile("sgd", "mse")
    >>> batches = [(np.ones((7, 7)), np.ones((7, 5)))]
    >>> report = kl.suggest_learning_rate(model, batches, steps=8, console=Console(quiet=True))
    >>> model.optimizer.learning_rate = report.learning_rate

    References: Smith 2017 (a range of rates before training), https://arxiv.org/abs/1506.01186;
    Blum et al. 1999 (the loss on each batch before it is learned), "Beating the Hold-Out".
    """
    rates = _checked(rates, steps)
    figure = None if plot is None else new_figure(6, 4)
    console = Console() if console is None else console
    with turn(model, "suggest_learning_rate") as tree, strategy_scope(tree):
        _check_model(model)
        check_batches(data)
        batches = list(batches_of(data, steps))
        if not batches:
            raise invalid("data", "at least one batch", "none")
        with Progress(console=console, transient=True) as progress:
            trials = _trials(model, batches, rates, steps, progress)
    report = RateReport(trials)
    _check_report(report, rates)
    if plot is not None:
        _draw(figure, report)
        write_figure(figure, plot)
    console.print(report)
    return report


def _checked(rates: Any, steps: Any) -> list[float]:
    wrong = isinstance(rates, str) or not hasattr(rates, "__iter__")
    values = [] if wrong else list(rates)
    if not values or not all(is_finite(rate) and rate > 0 for rate in values):
        raise invalid("rates", "positive numbers", rates, "leave it out for the default")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise invalid("steps", "at least 2 steps for each rate", steps)
    return sorted({float(rate) for rate in values})


def _check_model(model: keras.Model) -> None:
    if not getattr(model, "compiled", False) or model.optimizer is None:
        fix = "call model.compile(optimizer, loss) before"
        raise invalid("model", "a compiled model", model.name, fix)
    if not model.trainable_variables:
        fix = "add or activate an adapter"
        raise invalid("model", "a model in which something trains", model.name, fix)
    for part in parts_of(model.optimizer):
        if isinstance(part.get_config().get("learning_rate"), Mapping):
            fix = "compile with a number, and let the schedule rise to what is suggested"
            raise invalid("optimizer", "one without a schedule of its rate", type(part), fix)


def _trials(
    model: keras.Model,
    batches: Sequence[Any],
    rates: Sequence[float],
    steps: int,
    progress: Progress,
) -> list[RateTrial]:
    model.make_train_function()  # which may make slots anew, of the ranks that train
    if not model.optimizer.built:  # a LossScaleOptimizer would make its variables again
        model.optimizer.build(model.trainable_variables)
    optimizers = [model.optimizer, *parts_of(model.optimizer)]
    moving = [*model.trainable_variables, *(v for each in optimizers for v in each.variables)]
    bar = progress.add_task("", total=len(rates) * steps)
    trials: list[RateTrial] = []
    with left_as_it_was(model, moving) as restore:
        for rate in rates:
            restore()
            for part in parts_of(model.optimizer):
                part.learning_rate = rate
            losses = []
            for loss in _losses(model, batches, steps):
                losses.append(loss)
                progress.update(bar, advance=1, description=f"learning rate {rate:.1e}")
            trials.append(RateTrial(rate, tuple(losses)))
            if not trials[-1].loss <= losses[0]:
                break
    return trials


def _losses(model: keras.Model, batches: Sequence[Any], steps: int) -> Iterator[float]:
    """The loss before each step, to the first that is not finite."""
    for step in range(steps):
        sample = keras.utils.unpack_x_y_sample_weight(batches[step % len(batches)])
        logs = model.train_on_batch(*sample, return_dict=True)
        if "loss" not in logs:
            expected = "'loss' among what a step of training returns"
            raise invalid("model", expected, sorted(logs), "add it to the logs of train_step")
        yield float(logs["loss"])
        if not math.isfinite(logs["loss"]):
            return


def _check_report(report: RateReport, rates: Sequence[float]) -> None:
    if not math.isfinite(report.best.loss):
        fix = f"try lower ones: rates=[{rates[0] / 100:.0e}, {rates[0] / 10:.0e}]"
        raise invalid("rates", "one with which the loss stays finite", rates, fix)
    if len(rates) > 1 and report.learning_rate in (rates[0], rates[-1]):
        side = "higher" if report.learning_rate == rates[-1] else "lower"
        warn(
            f"Expected the lowest loss within the range of rates. Received: at its end, "
            f"{report.learning_rate:.1e}; a {side} rate may be better. Pass `rates`, or more "
            "`steps`."
        )


def _draw(figure: Any, report: RateReport) -> None:
    finite = [trial for trial in report.trials if math.isfinite(trial.loss)]
    axes = figure.subplots()
    axes.plot([trial.rate for trial in finite], [trial.loss for trial in finite], marker="o")
    axes.axvline(report.learning_rate, linestyle="--", color="gray")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss after the first half of the steps")
