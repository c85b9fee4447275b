"""Accuracy on the task of `make demo` with the base in floating point, in 8 and in 4 bits.

    python benchmarks/quantized_accuracy.py [--results results.jsonl] [--steps 96] [--check]

A pretrained MiniLM learns Rotten Tomatoes from 3,072 sentences by adapters of rank 8, as in
`examples/text_classification.py`, with the learning rate that was chosen there for a base in
floating point. The encoder is quantized before it is adapted, but for the pooler, which trains in
full. With LoftQ the adapters begin with what quantizing lost. Each seed gives all bases the same
head and batches, and all are scored on the same 3,000 sentences, none of which is in training. Each
run is written as a line of JSON as soon as it ends, and a run that is in the file is not run again.
Downloads 97 MB on the first run.
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
import functools
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import assets
import minilm
import numpy as np
from comparing import Study
from encoder import quantize
from minilm import CONFIG, HEAD, Data, classifier, tokenise
from rich.console import Console
from rich.table import Table
from text_classification import (
    CLASSES,
    LORA,
    SCORED_AT_ONCE,
    SEQUENCE_LENGTH,
    STEPS,
    study,
)
from timing import Bars, print_bars
from training import compile_for_training, output_folder, positive, progress_bars

import keras_lora as kl

TEST_ROWS = 3000  # a multiple of SCORED_AT_ONCE; 4,530 sentences are left for training
# The mode of a base, and whether its adapters begin with what quantizing lost.
BASES: dict[str, tuple[str | None, bool]] = {
    "float32": (None, False),
    "int8": ("int8", False),
    "int4": ("int4", False),
    "int4, LoftQ": ("int4", True),
}
MOST_POINTS = {"int8": 0.5, "int4": 1.0, "int4, LoftQ": 1.0}  # below the base in floating point

Right = np.ndarray  # of each test row, whether the answer is right


def trainee(mode: str | None) -> keras.Model:
    """A compiled classifier whose encoder is in `mode`, but for what trains in full."""
    backbone = minilm.encoder()
    if mode is not None:
        quantize(backbone, mode, filters=lambda layer: layer.name not in HEAD)
    model = classifier(len(CLASSES), backbone)
    compile_for_training(model)
    return model


def adapt_to_loss(model: keras.Model) -> None:
    kl.apply_lora(model, replace(CONFIG, init="loftq"), data=classifier(len(CLASSES)))


def runner(name: str, plain: Study, test: Data) -> Callable[[int], Right]:
    """A function of a seed that trains and says what is right then; its model compiles once."""
    right: list[Right] = []

    def score(model: keras.Model) -> float:
        """Of the model as it is, with adapters beside integers."""
        answers = model.predict(test.features, batch_size=SCORED_AT_ONCE, verbose=0)
        right.append(np.argmax(answers, axis=-1) == test.labels)
        return float(np.mean(right[-1]))

    mode, loftq = BASES[name]
    ours = replace(plain, base=lambda: trainee(mode), score=score)
    method = replace(LORA, name=name, prepare=adapt_to_loss if loftq else LORA.prepare)
    model = ours.trainee(method)

    def run(seed: int) -> Right:
        ours.run(model, method, ours.measure.learning_rate(method), seed)
        return right[-1]

    return run


def run_missing(options: argparse.Namespace, path: Path, console: Console) -> None:
    """Train and score what the file of results has not, and write it there."""
    known = read(path, options.steps)
    splits = assets.rotten_tomatoes(test=TEST_ROWS)
    train, test = (tokenise(rows, SEQUENCE_LENGTH) for rows in (splits.train, splits.test))
    with output_folder(None) as folder, progress_bars(console) as progress:
        plain = study(train, test, options.steps, folder, progress)
        run = functools.cache(lambda name: runner(name, plain, test))
        for seed, name in itertools.product(range(options.seeds), BASES):
            if (name, seed) not in known:
                bits = np.packbits(run(name)(seed)).tobytes().hex()
                line = {"base": name, "seed": seed, "steps": options.steps, "right": bits}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def read(path: Path, steps: int) -> dict[tuple[str, int], Right]:
    """The runs of a file of results that had as many steps."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [line for line in map(json.loads, lines) if line["steps"] == steps]
    bits = [np.frombuffer(bytes.fromhex(line["right"]), np.uint8) for line in found]
    return {
        (line["base"], line["seed"]): np.unpackbits(b, count=TEST_ROWS).astype(bool)
        for line, b in zip(found, bits, strict=True)
    }


def print_results(results: Mapping[str, np.ndarray], console: Console) -> Bars:
    """A row for each base, from arrays `(seeds, test rows)`; returns the bars.

    A difference to the base in floating point is of the same seeds and rows. Its standard error is
    taken twice: over the test rows, each the mean of its seeds, and over the seeds.
    """
    table = Table("base", "test accuracy", "each seed", "difference, points", "of each seed")
    table.add_column("s.e., rows")
    table.add_column("s.e., seeds")
    bars: Bars = {}
    for name, right in results.items():
        points = 100 * (right.astype(float) - results["float32"])
        seeds, mean = points.mean(axis=1), float(points.mean())
        cells = [f"{right.mean():.2%}", ", ".join(f"{x:.2%}" for x in right.mean(axis=1))]
        if name in MOST_POINTS:
            cells += [f"{mean:+.2f}", ", ".join(f"{x:+.2f}" for x in seeds)]
            cells += [f"{error(points.mean(axis=0)):.2f}", f"{error(seeds):.2f}"]
            bars[f"{name}: points below float32"] = (-mean, -100.0, MOST_POINTS[name])
        table.add_row(name, *cells)
    console.print(table)
    return bars


def error(values: np.ndarray) -> float:
    """The standard error of a mean; NaN of one value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=STEPS)
    parser.add_argument("--results", type=Path, help="keep the runs in this file, and go on there")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    options, console = parser.parse_args(), Console()
    with output_folder(None) as folder:
        path = options.results or folder / "results.jsonl"
        run_missing(options, path, console)
        found = read(path, options.steps)
    results = {
        name: np.stack([found[name, seed] for seed in range(options.seeds)]) for name in BASES
    }
    if not print_bars(print_results(results, console)) and options.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
