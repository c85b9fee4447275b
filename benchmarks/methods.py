"""Ways to fine-tune, each at its own rate, on real tasks, as a table.

    python benchmarks/methods.py [--tasks "Rotten Tomatoes"] [--methods auto "rank 8"] [--seeds 3]
    python benchmarks/methods.py --table    # what the file of results has, as Markdown

A pretrained MiniLM (22.7M parameters) learns to classify texts in 96 steps of 32 rows. For each
method some learning rates are tried on validation rows, with seed 0, and the best one trains with
each seed and is scored on test rows. *auto* is given no number: `apply_lora` finds the ranks and
the scale, `suggest_learning_rate` the rate, on the batches of seed 0. A seed gives all methods one
head and batches. A method runs in a process of its own, so that its memory can be told.

Each run is a line of JSON as soon as it ends, and a run that is in the file is not run again: a run
of this script that was killed goes on where it was. Downloads 135 MB on the first run. `--tiny`
trains random rows for a few steps, which says only whether everything works.

*Forgetting*: the encoder was trained to give the two halves of a text similar embeddings, and has
no head that predicts words. So of 256 texts of another kind, on which nothing trains, halves look
for their other half; what is told is how many points fewer find it after training than before.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

with silenced():
    import keras

import argparse
import datetime
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import method_tasks
from comparing import restart, save_trained
from method_table import RESULTS, UNTRAINED, Line, markdown, read
from method_tasks import TASKS, Task
from method_ways import QUIET, WAYS, Way, rate_of
from resident import MIB, forget_peak, resident
from rich.console import Console
from training import Steps, folder_bytes, positive, progress_bars

import keras_lora as kl
from keras_lora.files.atomic import write_files

STEPS, SEEDS = 96, 3


@dataclass(frozen=True)
class Results:
    """The runs in a file, each a line of JSON."""

    path: Path

    def find(self, **wanted: Any) -> list[Line]:
        return [x for x in read(self.path) if all(x.get(k) == v for k, v in wanted.items())]

    def add(self, line: Line) -> None:
        """Write the file anew, whole or not at all, with one more line."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        lines = [*read(self.path), {**line, "date": today, "version": kl.__version__}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_files(self.path.parent, {self.path.name: text.encode()})


@dataclass
class Runner:
    """Runs one method on one task; a run that is in the results is left out."""

    task: Task
    method: str
    steps: int
    results: Results
    console: Console
    empty: int = field(default_factory=lambda: resident("VmRSS"))
    rates: int | None = None
    model: keras.Model | None = None

    @property
    def way(self) -> Way:
        return WAYS[self.method]

    def key(self, part: str, **more: Any) -> Line:
        names = {"task": self.task.name, "method": self.method, "steps": self.steps}
        return {**names, "part": part, **more}

    def run(self, seeds: int) -> None:
        if not self.results.find(task=self.task.name, method=UNTRAINED):
            found = self.task.found_again(self.task.base())
            self.results.add({"task": self.task.name, "method": UNTRAINED, "found_again": found})
        rate = self.rate()
        for seed in range(seeds):
            if not self.results.find(**self.key("test", rate=rate, seed=seed)):
                self.train(rate, seed, "test")

    def rate(self) -> float:
        """The rate that is best on validation rows, or that the library suggests."""
        if not self.way.rates:
            known = self.results.find(**self.key("rate"))
            return known[0]["rate"] if known else self.suggested()
        rates = self.way.rates[: self.rates]
        if len(rates) == 1:
            return rates[0]
        for rate in rates:
            if not self.results.find(**self.key("validation", rate=rate)):
                self.train(rate, 0, "validation")
        tried = self.results.find(**self.key("validation"))
        return max(tried, key=lambda line: line["score"])["rate"]

    def suggested(self) -> float:
        started = time.perf_counter()
        model = self.trainee(0)
        prepared = time.perf_counter()
        rate = rate_of(model, self.task.batches(self.steps, 0))
        seconds = {"rank": prepared - started, "rate": time.perf_counter() - prepared}
        reasons = list(kl.lora_summary(model, QUIET).settled.values())
        self.results.add(self.key("rate", rate=rate, seconds=seconds, settled=reasons))
        return rate

    def fresh(self, seed: int) -> keras.Model:
        keras.utils.set_random_seed(seed)
        model = self.task.base()
        self.way.prepare(model, self.task.batches(self.steps, 0))
        return model

    def trainee(self, seed: int) -> keras.Model:
        """A model as it begins; the one that has trained, whose step is compiled, if it can be."""
        fresh = self.fresh(seed)
        if self.model is None:
            self.model = fresh
        else:
            restart(self.model, fresh)
        return self.model

    def train(self, rate: float, seed: int, part: str) -> None:
        title = f"{self.task.name}, {self.method}, rate {rate:g}, seed {seed}"
        model = self.trainee(seed)
        forget_peak()
        with progress_bars(self.console) as progress:
            bar = Steps(rate, self.steps, progress, title)
            self.fit(model, bar, seed)
        peak = resident("VmHWM") - self.empty
        line = self.key(part, rate=rate, seed=seed, step_ms=1000 * bar.median, peak_mib=peak / MIB)
        self.score(model, line)
        if part == "test":
            for name, change in self.way.smaller.items():
                change(model)
                self.score(model, {**line, "method": name, "trained_as": self.method})
        if self.way.epochs > 1 or (part == "test" and self.way.smaller):
            self.model = None  # its ranks are others now

    def fit(self, model: keras.Model, bar: Steps, seed: int) -> None:
        data, held = self.task.batches(self.steps, seed), self.task.validation
        options: dict[str, Any] = {}
        if self.way.epochs > 1:
            options["epochs"] = self.way.epochs
            options["steps_per_epoch"] = self.steps // self.way.epochs
            options["validation_data"] = held.features, held.labels
            options["validation_batch_size"] = self.task.at_once
        callbacks = [bar, *self.way.callbacks()]
        model.fit(data, shuffle=False, verbose=0, callbacks=callbacks, **options)

    def score(self, model: keras.Model, line: Line) -> None:
        rows = self.task.validation if line["part"] == "validation" else self.task.test
        line["score"] = self.task.accuracy(model, rows)
        line["trained"], line["bytes"] = size(model)
        if line["part"] == "test":
            line["found_again"] = self.task.found_again(model)
        self.results.add(line)
        self.console.print(f"{line['method']}, {line['part']}: {line['score']:.4f}")


def size(model: keras.Model) -> tuple[int, int]:
    """How many parameters were trained, and the bytes of a file that has them."""
    with tempfile.TemporaryDirectory() as folder:
        if not kl.lora_layers(model):
            trained = sum(math.prod(v.shape) for v in model.trainable_variables)
            return trained, save_trained(model, Path(folder, "trained.safetensors"))
        kl.save_adapter(model, folder)
        return kl.lora_summary(model, QUIET).trained.parameters, folder_bytes(Path(folder))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=positive, default=SEEDS)
    parser.add_argument("--steps", type=positive, default=STEPS, help="a multiple of 6")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rates", type=positive, help="of each method so many, the first ones")
    parser.add_argument("--here", action="store_true", help="all in this process")
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    parser.add_argument("--tiny", action="store_true", help="random rows, few steps, no downloads")
    options = parser.parse_args(given)
    if options.tiny:
        options.tasks, options.steps, options.seeds, options.here = ["tiny"], 6, 1, True
        options.rates = 1
    return options


def run_here(options: argparse.Namespace, tasks: Mapping[str, Any], console: Console) -> None:
    for name in options.tasks:
        empty, task = resident("VmRSS"), tasks[name]()
        for method in options.methods:
            results = Results(options.results)
            runner = Runner(task, method, options.steps, results, console, empty, options.rates)
            runner.run(options.seeds)


def run_apart(options: argparse.Namespace) -> None:
    """A process for each method of each task."""
    for task in options.tasks:
        for method in options.methods:
            command = [sys.executable, __file__, "--here", "--tasks", task, "--methods", method]
            command += ["--seeds", str(options.seeds), "--steps", str(options.steps)]
            command += ["--rates", str(options.rates)] if options.rates else []
            subprocess.run([*command, "--results", str(options.results)], check=True)


def main(given: Sequence[str] | None = None) -> None:
    options, console = arguments(given), Console()
    if options.table:
        print(markdown(read(options.results)), end="")
    elif options.here:
        run_here(options, {**TASKS, "tiny": method_tasks.tiny}, console)
    else:
        run_apart(options)


if __name__ == "__main__":
    main()
