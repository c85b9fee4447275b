"""Which garment is in the picture? LoRA on the convolutions of a MobileNetV2.

    python examples/image_classification.py            # three seeds
    python examples/image_classification.py --sweep    # how the learning rates were chosen
    python examples/image_classification.py --quick    # few steps, one seed: whether all works

A MobileNetV2 (2.3M parameters) that knows breeds of dogs learns the ten classes of Fashion-MNIST
from 4,096 images, of 28 by 28 pixels enlarged to 64 by 64: by low-rank adapters of all its
convolutions, depthwise ones too, by full fine-tuning, and by training of the new head alone. The
head trains in all three, and batch normalization keeps its statistics.

Downloads 51 MB on the first run (see `assets.py`).
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
from collections.abc import Sequence
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
from training import batches, compile_for_training, output_folder, progress_bars

import keras_lora as kl

SIDE = 64
STEPS, QUICK_STEPS = 96, 2
TRAIN, VALIDATION, TEST = 4096, 1000, 2000
SCORED_AT_ONCE = 100
CONFIG = kl.LoRAConfig(rank=8, alpha=16, targets="convolutions", layers_to_save=["classes"])


def network() -> keras.Model:
    """The convolutional part of the classifier of dogs, for images of our size."""
    dogs = keras.models.load_model(assets.mobilenet(), compile=False)
    (convolutions,) = (layer for layer in dogs.layers if isinstance(layer, keras.Model))
    # Some were frozen when the dogs were learned. On TensorFlow a model that is trainable itself
    # does not pass on that it is to be.
    for layer in convolutions.layers:
        layer.trainable = True
    smaller = keras.models.clone_model(convolutions, input_tensors=keras.Input((SIDE, SIDE, 3)))
    smaller.set_weights(convolutions.get_weights())
    return smaller


def classifier(network: keras.Model) -> keras.Model:
    """A copy of the network with a new head, on gray images."""
    pixels = keras.Input((28, 28, 1))
    image = keras.layers.Resizing(SIDE, SIDE)(pixels)
    image = keras.layers.Concatenate()([keras.layers.Rescaling(1 / 127.5, -1)(image)] * 3)
    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())
    features = keras.layers.GlobalAveragePooling2D()(copy(image, training=False))
    scores = keras.layers.Dense(len(assets.FASHION_CLASSES), name="classes")(features)
    model = keras.Model(pixels, scores)
    # XLA on a CPU is slow at depthwise convolutions.
    compile_for_training(model, jit=False)
    return model


def adapt(model: keras.Model) -> None:
    kl.apply_lora(model, CONFIG)


def train_head(model: keras.Model) -> None:
    for layer in model.layers:
        layer.trainable = layer.name == "classes"


# The accuracies are those of `--sweep`, on one H200 with JAX.
METHODS = (
    Method("LoRA", adapt, {1e-3: 0.842, 2e-3: 0.860, 5e-3: 0.684, 1e-2: 0.100}),
    Method(
        "full fine-tuning", train_everything, {2e-4: 0.648, 5e-4: 0.716, 1e-3: 0.503, 2e-3: 0.121}
    ),
    Method("head only", train_head, {2e-3: 0.825, 5e-3: 0.856, 1e-2: 0.852, 2e-2: 0.853}),
)


def rows(images: assets.Images, part: slice) -> tuple[np.ndarray, np.ndarray]:
    return images.pixels[part, ..., None].astype("float32"), images.labels[part]


def study(validate: bool, steps: int, folder: Path, progress: Progress) -> Study:
    images, base = assets.fashion_mnist("train"), network()
    pixels, labels = rows(images, slice(0, TRAIN))
    if validate:
        scored, right = rows(images, slice(TRAIN, TRAIN + VALIDATION))
    else:
        scored, right = rows(assets.fashion_mnist("t10k"), slice(0, TEST))
    plain = Plain(classifier(base), jit=False)

    def accuracy(model: keras.Model) -> float:
        scores = plain.like(model).predict(scored, batch_size=SCORED_AT_ONCE, verbose=0)
        return float(np.mean(scores.argmax(-1) == right))

    return Study(
        title="Fashion-MNIST",
        base=functools.partial(classifier, base),
        methods=METHODS,
        batches=lambda seed: batches(pixels, labels, steps, seed),
        score=accuracy,
        measure=Measure("accuracy", "{:.1%}", max),
        steps=steps,
        folder=folder,
        progress=progress,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = comparison_options(__doc__, STEPS, QUICK_STEPS, arguments), Console()
    started = time.perf_counter()
    with output_folder(options.out) as folder, progress_bars(console) as progress:
        methods = study(options.sweep, options.steps, folder, progress)
        report(methods, options, console)
    console.print(f"{time.perf_counter() - started:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
