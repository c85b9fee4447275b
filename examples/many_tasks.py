"""Two tasks on one encoder in memory: film reviews and newswire topics, an adapter and a head each.

    python examples/many_tasks.py

Two classifiers, of 2 and of 8 classes, are built around one MiniLM (22.7M parameters). Each learns
its task as an adapter with a name, one after the other, and `set_adapter` switches between them.
Then each adapter is saved, and loaded into a new model around a new encoder.

The exit status is 1 unless

- each task, after the other one was trained and active, answers its test rows bit for bit as right
  after its own training, and differently while the other one's adapter is active;
- no switch makes TensorFlow trace a step again;
- the loaded adapters answer as the trained ones did, up to 1e-5 in the logits.

Needs `pip install keras-lora[nlp]`; downloads 135 MB on the first run (see `assets.py`).
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assets
import numpy as np
from minilm import CONFIG, Data, classifier, encoder, tokenise
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from training import (
    Steps,
    argument_parser,
    batches,
    compile_for_training,
    folder_bytes,
    megabytes,
    output_folder,
    progress_bars,
)

import keras_lora as kl

STEPS = 96
# The best of `text_classification.py --sweep`; no choice depended on these test rows.
LEARNING_RATE = 2e-3
SEED = 0
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Task:
    """Rows, the model that classifies them, and the name of its adapter."""

    title: str
    adapter: str
    train: Data
    test: Data
    model: keras.Model

    @property
    def classes(self) -> int:
        return int(self.model.num_classes)

    @property
    def majority(self) -> float:
        """The accuracy of the answer that is most often right."""
        return float(np.bincount(self.test.labels).max() / len(self.test.labels))

    def answers(self, model: keras.Model) -> np.ndarray:
        """The logits of the test rows."""
        rows = len(self.test.labels)
        # A smaller last batch would cause another compilation.
        at_once = max(size for size in range(1, 129) if rows % size == 0)
        return np.asarray(model.predict(self.test.features, batch_size=at_once, verbose=0))


@dataclass(frozen=True)
class Outcome:
    """The logits of a task's test rows in four situations, and the bytes of its files."""

    task: Task
    other_acts: np.ndarray
    trained: np.ndarray
    back: np.ndarray
    loaded: np.ndarray
    adapter_bytes: int
    copy_bytes: int

    @property
    def moved(self) -> float:
        """The largest difference that saving and loading made to a logit."""
        return float(np.abs(self.loaded - self.trained).max())

    def failures(self) -> list[str]:
        accuracy = self.task.test.accuracy
        passed = {
            "other answers after switching back": np.array_equal(self.back, self.trained),
            "the other adapter does nothing": not np.array_equal(self.other_acts, self.trained),
            f"logits moved by {self.moved:.1e} in the files": self.moved <= TOLERANCE,
            "another accuracy from the files": accuracy(self.loaded) == accuracy(self.trained),
        }
        return [f"{self.task.title}: {failure}" for failure, fine in passed.items() if not fine]


COUNTS: Mapping[str, Callable[[Outcome], int]] = {
    "labels": lambda x: x.task.classes,
    "test rows": lambda x: len(x.task.test.labels),
}
ACCURACIES: Mapping[str, Callable[[Outcome], float]] = {
    "accuracy of the commonest label": lambda x: x.task.majority,
    "while the other adapter is active": lambda x: x.task.test.accuracy(x.other_acts),
    "right after training": lambda x: x.task.test.accuracy(x.trained),
    "after switching away and back": lambda x: x.task.test.accuracy(x.back),
    "from its files, in a new model": lambda x: x.task.test.accuracy(x.loaded),
}


class Traces:
    """Counts how often the steps of models are traced: TensorFlow runs their Python only then.

    The first step of training is traced twice, and the first prediction once.
    """

    def __init__(self, models: Iterable[keras.Model]) -> None:
        self.count = 0
        for model in models:
            model.train_step = self._counted(model.train_step)
            model.predict_step = self._counted(model.predict_step)

    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def counted(data: Any) -> Any:
            self.count += 1
            return step(data)

        return counted


def two_tasks() -> list[Task]:
    keras.utils.set_random_seed(SEED)
    shared = encoder()
    films, topics = classifier(2, shared), classifier(len(assets.REUTERS_TOPICS), shared)
    return [
        task("Rotten Tomatoes", "films", assets.rotten_tomatoes(), 32, films),
        task("Reuters R8", "news", assets.reuters(), 48, topics),
    ]


def task(title: str, adapter: str, splits: assets.Splits, length: int, model: keras.Model) -> Task:
    """A task whose rows are cut after `length` tokens."""
    return Task(
        title, adapter, tokenise(splits.train, length), tokenise(splits.test, length), model
    )


def adapt(tasks: Sequence[Task]) -> None:
    """Give each task its adapter before any trains, since adding one discards compiled steps."""
    for task in tasks:
        kl.apply_lora(task.model, CONFIG, name=task.adapter)
        compile_for_training(task.model)


def train(task: Task, steps: int, progress: Progress) -> np.ndarray:
    """Train a task's adapter and head; returns the answers right after training."""
    kl.set_adapter(task.model, task.adapter)
    callback = Steps(LEARNING_RATE, steps, progress, task.title)
    rows = batches(task.train.features, task.train.labels, steps, SEED)
    task.model.fit(rows, shuffle=False, verbose=0, callbacks=[callback])
    return task.answers(task.model)


def switched(task: Task, active: Task) -> np.ndarray:
    """The answers of a task while the adapter of `active` is active in the encoder."""
    kl.set_adapter(active.model, active.adapter)
    return task.answers(task.model)


def outcome(task: Task, other: Task, trained: np.ndarray, folder: Path) -> Outcome:
    other_acts, back = switched(task, active=other), switched(task, active=task)
    adapter, copy = folder / task.adapter, folder / f"{task.adapter}.keras"
    kl.save_adapter(task.model, adapter, name=task.adapter, overwrite=True)
    loaded, model = load(task, adapter)
    kl.merge_lora(model).save(copy)
    return Outcome(
        task, other_acts, trained, back, loaded, folder_bytes(adapter), copy.stat().st_size
    )


def load(task: Task, directory: Path) -> tuple[np.ndarray, keras.Model]:
    """The answers of a new model around a new encoder, with the adapter from its directory."""
    model = classifier(task.classes)
    kl.load_adapter(model, directory, name=task.adapter)
    model.compile(jit_compile=True)
    return task.answers(model), model


def report(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="One encoder, two tasks")
    table.add_column()
    for outcome in outcomes:
        table.add_column(outcome.task.title, justify="right")
    table.add_column("sum", justify="right")
    for heading, count in COUNTS.items():
        table.add_row(heading, *(f"{value:,}" for value in with_sum(outcomes, count)))
    for heading, accuracy in ACCURACIES.items():
        table.add_row(heading, *(f"{accuracy(outcome):.2%}" for outcome in outcomes))
    adapters = with_sum(outcomes, lambda x: x.adapter_bytes)
    copies = with_sum(outcomes, lambda x: x.copy_bytes)
    table.add_row("adapter's directory", *map(megabytes, adapters))
    table.add_row("merged copy of the model", *map(megabytes, copies))
    ratios = (copy / adapter for copy, adapter in zip(copies, adapters, strict=True))
    table.add_row("copy / adapter", *(f"{ratio:.1f}" for ratio in ratios))
    return table


def with_sum(outcomes: Sequence[Outcome], value: Callable[[Outcome], int]) -> list[int]:
    values = [value(outcome) for outcome in outcomes]
    return [*values, sum(values)]


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = argument_parser(__doc__, STEPS).parse_args(arguments), Console()
    started = time.perf_counter()
    with console.status("Downloading and tokenising"):
        tasks = two_tasks()
        adapt(tasks)
    traces = Traces(task.model for task in tasks)
    with progress_bars(console) as progress:
        trained = [train(task, options.steps, progress) for task in tasks]
    first = traces.count
    pairs = zip(tasks, reversed(tasks), trained, strict=True)
    with console.status("Switching, saving and loading"), output_folder(options.out) as folder:
        outcomes = [outcome(task, other, logits, folder) for task, other, logits in pairs]
    again = traces.count - first
    console.print(report(outcomes))
    console.print(f"Steps traced until both were trained: {first}; by switching: {again}.")
    moved = max(outcome.moved for outcome in outcomes)
    console.print(f"Largest difference of a logit from the files: {moved:.1e} ({TOLERANCE:g}).")
    failures = [failure for outcome in outcomes for failure in outcome.failures()]
    failures += [f"{again} steps were traced again"] if again else []
    for failure in failures:
        console.print(f"Failed: {failure}.")
    console.print(f"{time.perf_counter() - started:.0f} s in all.")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
