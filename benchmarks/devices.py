"""A training step on several devices: the bytes that travel, and the work.

    python benchmarks/devices.py [--devices 1 2 4 8] [--layers 12] [--tiny] [--check]

A BERT-shaped classifier on JAX under `keras.distribution.DataParallel`, all linear layers adapted
at rank 8, and fine-tuned in full. The devices are virtual ones of one CPU, in a process for
each number of them, and each gets the same rows (weak scaling). The bytes are those that the
compiled step gives to all-reduce, whose results every device has: gradients, and the loss. Virtual
devices share the processors, so the seconds say how the work grows, and not how fast it would be.
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["KERAS_BACKEND"] = "jax"

with silenced():
    import jax
    import keras

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from math import prod
from typing import Any

from encoder import add_shape, classifier, compiled, fixed_batch, with_everything
from rich.console import Console
from rich.table import Table
from scale import seconds
from timing import Bars, print_bars

import keras_lora as kl

MOST = 1.05  # times the bytes of what trains
WAYS: dict[str, Callable[[keras.Model], object]] = {
    "LoRA": lambda model: kl.apply_lora(model, kl.LoRAConfig(rank=8)),
    "full": with_everything,
}
# `%name = (f32[3,5]{1,0}, f32[]) all-reduce(`, or with `all-reduce-start`, on a line.
_REDUCED = re.compile(r"= (.*) all-reduce(?:-start)?\(")
_SHAPE = re.compile(r"\b[a-z]+(\d*)\[([\d,]*)\]")


def bytes_reduced(hlo: str) -> int:
    """The bytes of the results of all-reduce in a compiled module."""
    shapes = [found for results in _REDUCED.findall(hlo) for found in _SHAPE.findall(results)]
    return sum(
        int(bits or 8) // 8 * prod(map(int, filter(None, dims.split(",")))) for bits, dims in shapes
    )


def compiled_step(model: keras.Model, x: Any, y: Any) -> str:
    """The module of a training step, as Keras's `fit` compiles it on JAX."""
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in variables)
    layout = keras.distribution.distribution().get_data_layout
    batch = jax.tree.map(lambda a: jax.device_put(a, layout(a.shape).backend_layout), (x, y))
    return str(jax.jit(model.train_step).lower(state, batch).compile().as_text())


def measure_here(args: argparse.Namespace) -> None:
    """Print the figures of one way on all devices of this process."""
    keras.utils.set_random_seed(0)
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    args.batch *= len(jax.devices())
    model = classifier(args)
    WAYS[args.only](model)
    compiled(model, jit=True)
    x, y = fixed_batch(args)
    model.fit(x, y, batch_size=args.batch, verbose=0)
    figures = {
        "trained": sum(4 * prod(v.shape) for v in model.trainable_variables),
        "reduced": bytes_reduced(compiled_step(model, x, y)),
        "seconds": seconds(lambda: model.fit(x, y, batch_size=args.batch, verbose=0)),
    }
    print(json.dumps(figures))


def measured(way: str, devices: int) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", way]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environ = {**os.environ, "XLA_FLAGS": flags}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
    figures: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
    return figures


def print_rows(rows: dict[tuple[str, int], dict[str, float]]) -> None:
    titles = "devices", "trained, bytes", "all-reduce, bytes", "/ trained", "CPU s a device"
    table = Table("", *titles)
    for (way, devices), row in rows.items():
        cells = f"{devices}", f"{row['trained']:,.0f}", f"{row['reduced']:,.0f}"
        shares = f"{row['reduced'] / row['trained']:.4f}", f"{row['seconds'] / devices:.3f}"
        table.add_row(way, *cells, *shares)
    Console().print(table)


def bars(rows: dict[tuple[str, int], dict[str, float]]) -> Bars:
    return {
        f"{way}, {devices} devices, all-reduce / trained": (
            row["reduced"] / row["trained"],
            0.0,
            MOST,
        )
        for (way, devices), row in rows.items()
        if way == "LoRA"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_shape(parser, layers=4)
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--only", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.layers, args.width, args.length, args.vocabulary = 1, 64, 16, 1009
    if args.only:
        measure_here(args)
        return
    rows = {(way, n): measured(way, n) for way in args.ways for n in args.devices}
    print_rows(rows)
    if not print_bars(bars(rows)) and args.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
