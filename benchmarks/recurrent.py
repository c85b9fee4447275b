"""Time of a training step of an LSTM: keras_lora, the floor, full fine-tuning.

    python benchmarks/recurrent.py [--check]

An LSTM of 256 units over 100 time steps of 128 features, between a dense layer and a head, Adam,
one fixed batch. `keras_lora` adapts both kernels of the cell at rank 8. In the *floor* they are
frozen and nothing else of the LSTM trains. In both the dense layer trains too, so that gradients
flow through all time steps, and the head; full fine-tuning trains everything.
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
from collections.abc import Callable

import numpy as np
from encoder import with_everything
from timing import Step, interleaved, print_bars, print_times, ratio

import keras_lora as kl

RANK, ALPHA, UNITS, STEPS, FEATURES = 8, 16.0, 256, 100, 128
BEFORE, HEAD = "before", "head"


def with_keras_lora(model: keras.Model) -> None:
    config = kl.LoRAConfig(
        rank=RANK,
        alpha=ALPHA,
        targets=["lstm_cell"],
        layers_to_save=[BEFORE, HEAD],
    )
    kl.apply_lora(model, config)


def with_frozen_kernels(model: keras.Model) -> None:
    model.get_layer("lstm").trainable = False


VARIANTS: dict[str, Callable[[keras.Model], None]] = {
    "keras_lora": with_keras_lora,
    "floor": with_frozen_kernels,
    "full": with_everything,
}


def stepper(args: argparse.Namespace, variant: str) -> Step:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((STEPS, FEATURES)),
            layers.Dense(FEATURES, name=BEFORE),
            layers.LSTM(UNITS, name="lstm"),
            layers.Dense(1, name=HEAD),
        ]
    )
    VARIANTS[variant](model)
    model.compile(keras.optimizers.Adam(1e-4), "mse", jit_compile=args.jit)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(args.batch, STEPS, FEATURES)).astype("float32")
    y = rng.normal(size=(args.batch, 1))

    def step() -> None:
        model.train_on_batch(x, y)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15, help="rounds, after 2 that do not count")
    parser.add_argument("--jit", action="store_true", help="with XLA")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args()
    times = interleaved({name: stepper(args, name) for name in VARIANTS}, args.steps)
    title = f"Training step of an LSTM, XLA {'on' if args.jit else 'off'}"
    print_times(f"{title}, batch {args.batch} x {STEPS} x {FEATURES}", times, "keras_lora")
    met = print_bars({"keras_lora / floor": (ratio(times, "keras_lora", "floor"), 0.0, 1.05)})
    if args.check and not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
