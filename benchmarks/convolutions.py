"""Time of a training step of convolutional models: keras_lora, `enable_lora`, full fine-tuning.

    python benchmarks/convolutions.py [--check]

A MobileNetV2 and a ResNet-50 of keras.applications with random weights and a classifier, Adam, one
fixed batch. `keras_lora` adapts all convolutions at rank 8; `enable_lora` those that have it, which
are all but the depthwise ones, and `same layers` is `keras_lora` on these. All three train the
classifier too and freeze all else, normalization included; full fine-tuning trains everything. In
the *floor* only the first convolution trains: gradients flow to the bottom through Keras's own
layers, and no other gradient of a kernel is taken.
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
import gc
import sys
from collections.abc import Callable

import numpy as np
from encoder import compiled, with_everything
from timing import Bars, Step, interleaved, print_bars, print_times, ratio

import keras_lora as kl

RANK, ALPHA, CLASSES, HEAD = 8, 16.0, 10, "predictions"
# The highest ratios to `enable_lora` and to full fine-tuning.
MODELS: dict[str, float] = {"MobileNetV2": 0.90, "ResNet50": 0.85}


def with_keras_lora(model: keras.Model) -> None:
    config = kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets="convolutions", layers_to_save=[HEAD])
    kl.apply_lora(model, config)


def with_same_layers(model: keras.Model) -> None:
    config = kl.LoRAConfig(
        rank=RANK,
        alpha=ALPHA,
        targets=lambda target: target.kind == "Conv2D",
        layers_to_save=[HEAD],
    )
    kl.apply_lora(model, config)


def with_enable_lora(model: keras.Model) -> None:
    for layer in model.layers:
        layer.trainable = layer.name == HEAD
        if hasattr(layer, "enable_lora") and layer.name != HEAD:
            layer.trainable = True
            layer.enable_lora(RANK, lora_alpha=ALPHA)
            for variable in layer.variables:
                variable.trainable = "lora_" in variable.name


def with_the_first_alone(model: keras.Model) -> None:
    first = next(layer for layer in model.layers if layer.weights)
    for layer in model.layers:
        layer.trainable = layer is first


VARIANTS: dict[str, Callable[[keras.Model], None]] = {
    "keras_lora": with_keras_lora,
    "same layers": with_same_layers,
    "enable_lora": with_enable_lora,
    "floor": with_the_first_alone,
    "full": with_everything,
}


def stepper(args: argparse.Namespace, application: str, variant: str) -> Step:
    keras.utils.set_random_seed(0)
    shape = (args.size, args.size, 3)
    model = getattr(keras.applications, application)(
        weights=None, input_shape=shape, classes=CLASSES, classifier_activation=None
    )
    VARIANTS[variant](model)
    compiled(model, args.jit)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(args.batch, *shape)).astype("float32")
    y = rng.integers(0, CLASSES, args.batch)

    def step() -> None:
        model.train_on_batch(x, y)

    return step


def section(args: argparse.Namespace, application: str) -> Bars:
    steps = {name: stepper(args, application, name) for name in args.variants}
    times = interleaved(steps, args.steps)
    title = f"Training step of {application}, XLA {'on' if args.jit else 'off'}"
    print_times(f"{title}, batch {args.batch} x {args.size} x {args.size}", times, "keras_lora")
    return {
        f"{application}: {name} / {other}": (ratio(times, name, other), 0.0, MODELS[application])
        for name, other in (("same layers", "enable_lora"), ("keras_lora", "full"))
        if {name, other} <= times.keys()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=96, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=9, help="rounds, after 2 that do not count")
    parser.add_argument("--jit", action="store_true", help="with XLA")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args()
    bars: Bars = {}
    for application in args.models:
        bars |= section(args, application)
        keras.backend.clear_session()
        gc.collect()
    met = print_bars(bars)
    if args.check and not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
