"""A merged model against its base: time of a training step and of `predict`, and graph size.

    python benchmarks/merged.py [--check]

Two copies of a BERT-shaped KerasHub encoder with a classifier; one was adapted at rank 8, its
adapters were set to random values, and it was merged. All weights of both train.
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

with silenced():
    import keras

import argparse
import sys
import tempfile
from pathlib import Path

from encoder import add_shape, classifier, compiled, fixed_batch
from timing import Bars, Step, interleaved, print_bars, print_times, ratio

import keras_lora as kl

TOLERANCE = 0.03


def merged(model: keras.Model) -> keras.Model:
    kl.apply_lora(model, kl.LoRAConfig(rank=8))
    for layer in kl.lora_layers(model).values():
        for factor in layer.adapters["default"].factors:
            factor.assign(keras.random.normal(factor.shape, stddev=0.02))
    return kl.merge_lora(model)


def training(model: keras.Model, args: argparse.Namespace) -> Step:
    x, y = fixed_batch(args)

    def step() -> None:
        model.train_on_batch(x, y)

    return step


def predicting(model: keras.Model, args: argparse.Namespace) -> Step:
    x, _ = fixed_batch(args)

    def step() -> None:
        model.predict_on_batch(x)

    return step


def operations(model: keras.Model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return kl.export_saved_model(model, Path(folder, "1")).operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_shape(parser, layers=4)
    parser.add_argument("--steps", type=int, default=25, help="rounds, after 2 that do not count")
    parser.add_argument("--jit", action="store_true", help="compile with XLA")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args()

    keras.utils.set_random_seed(0)
    models = {"merged": merged(classifier(args)), "base": classifier(args)}
    bars: Bars = {}
    counts = {name: operations(model) for name, model in models.items()}
    bars[f"operations exported, {counts['merged']} - {counts['base']}"] = (
        counts["merged"] - counts["base"],
        0,
        0,
    )
    for model in models.values():
        compiled(model, args.jit)
    for what, make in (("predict", predicting), ("train", training)):
        steps = {name: make(model, args) for name, model in models.items()}
        times = interleaved(steps, args.steps)
        print_times(f"{what}, {args.layers} x {args.width}", times, "merged")
        value = ratio(times, "merged", "base")
        bars[f"{what}: merged / base"] = (value, 1 - TOLERANCE, 1 + TOLERANCE)
    met = print_bars(bars)
    if args.check and not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
