"""Predicted beside measured: `memory_plan` and the peak of the training step that it is of.

    python benchmarks/memory_plan.py [--shapes "encoder float32"] [--tiny] [--check]

A Llama-shaped decoder and a BERT-shaped encoder of KerasHub with random weights, LoRA on all linear
layers, Adam, XLA off, in eight ways. Measured is the peak resident size of a second step minus the
size when everything was imported, in a process of its own, minus what TensorFlow itself takes for
such a graph: the same figure of a narrow model of as many layers, beyond its plan. It is measured
with the two settings of docs/memory.md, one operation at a time and freed memory given back, and as
processes are without them. The plans are made of models without values. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import keras_hub
import memory  # sets the backend
import numpy as np
import tensorflow as tf
from encoder import quantize
from resident import MIB, SPARING, forget_peak, resident
from rich.console import Console
from rich.table import Table
from timing import Bars, print_bars

import keras_lora as kl

MOST = 0.15
TOKENS = 256
OPTIONS: dict[str, dict[str, Any]] = {
    "blocks": {"rematerialize": "auto"},
    "chunks": {"chunk_tokens": TOKENS},
}


@dataclass(frozen=True)
class Shape:
    """A model, how it trains, and its batch."""

    kind: str
    dtype: str
    how: tuple[str, ...] = ()
    tiny: bool = False

    @property
    def batch_shape(self) -> tuple[int, int]:
        if self.tiny:
            return 2, 32
        return (2, 512) if self.kind == "decoder" else (4, 256)

    @property
    def quantized(self) -> str | None:
        return next((name for name in self.how if name not in OPTIONS), None)

    def __str__(self) -> str:
        return " ".join([self.kind, self.dtype, *self.how])


SHAPES = [
    Shape("decoder", "float32"),
    Shape("decoder", "bfloat16"),
    Shape("decoder", "float32", ("blocks",)),
    Shape("decoder", "bfloat16", ("blocks", "chunks")),
    Shape("decoder", "float32", ("int8",)),
    Shape("decoder", "float32", ("int4", "blocks", "chunks")),
    Shape("encoder", "float32"),
    Shape("encoder", "bfloat16", ("blocks",)),
]


def decoder(shape: Shape) -> keras.Model:
    given = ["--layers", "3", "--dtype", shape.dtype]
    sizes = memory.arguments([*given, *(["--width", "256"] if shape.tiny else [])])
    return keras_hub.models.LlamaCausalLM(memory.llama(sizes), preprocessor=None)


def encoder(shape: Shape) -> keras.Model:
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=8000,
        num_layers=3,
        num_heads=4 if shape.tiny else 12,
        hidden_dim=64 if shape.tiny else 768,
        intermediate_dim=256 if shape.tiny else 3072,
        dtype=shape.dtype,
    )
    return keras_hub.models.BertTextClassifier(backbone, num_classes=3, preprocessor=None)


MODELS: dict[str, Callable[[Shape], keras.Model]] = {"decoder": decoder, "encoder": encoder}
CONFIG = kl.LoRAConfig(rank=memory.RANK)


def planned(shape: Shape) -> kl.MemoryPlan:
    """The plan, for a model without values."""
    with tf.Graph().as_default():
        model = MODELS[shape.kind](shape)
    options: dict[str, Any] = {"quantized": shape.quantized, "optimizer": "adam"}
    for name in shape.how:
        options |= OPTIONS.get(name, {})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return kl.memory_plan(model, CONFIG, shape.batch_shape, loss=loss, **options)


def prepared(shape: Shape) -> keras.Model:
    model = MODELS[shape.kind](shape)
    if shape.quantized:
        quantize(model, shape.quantized)
    kl.apply_lora(model, CONFIG)
    if "blocks" in shape.how:
        kl.rematerialize(model)
    if "chunks" in shape.how:
        kl.chunk_logits(model, TOKENS)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=False, weighted_metrics=[])
    return model


def batch(shape: Shape) -> tuple[dict[str, np.ndarray], np.ndarray]:
    tokens = np.random.default_rng(0).integers(1, 8000, shape.batch_shape, "int32")
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    if shape.kind == "decoder":
        return x, tokens
    return {**x, "segment_ids": np.zeros_like(tokens)}, tokens[:, 0] % 3


def measure_here(shape: Shape) -> None:
    """Print the peak of a second step above the size of this process as it is now."""
    before = resident("VmRSS")
    model = prepared(shape)
    x, y = batch(shape)
    model.train_on_batch(x, y)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    model.train_on_batch(x, y)
    print(json.dumps(resident("VmHWM") - before))


def measured(shape: Shape, settings: Mapping[str, str]) -> int:
    command = [sys.executable, __file__, "--only", json.dumps(dataclasses.asdict(shape))]
    environ = {**os.environ, **settings}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
    return int(output.stdout.splitlines()[-1])


def beyond_the_plan(shape: Shape) -> int:
    """What a step takes that no plan counts: the graph, the runtime, the interpreter."""
    return measured(shape, SPARING) - planned(shape).peak


@dataclass(frozen=True)
class Figures:
    """Bytes of a step's peak; measured ones without what TensorFlow itself takes."""

    predicted: int
    runtime: int
    measured: int
    without: int

    @property
    def ratios(self) -> tuple[float, float]:
        return self.predicted / self.measured, self.predicted / self.without

    @property
    def cells(self) -> list[str]:
        sizes = [self.predicted, self.runtime, self.measured, self.without]
        return [*(f"{x / MIB:,.0f}" for x in sizes), *(f"{x:.3f}" for x in self.ratios)]


COLUMNS = "predicted", "TensorFlow itself", "measured", "without settings", "ratio", "without"


def figures_of(shape: Shape, tiny: bool) -> Figures:
    runtime = beyond_the_plan(dataclasses.replace(shape, tiny=True))
    own = dataclasses.replace(shape, tiny=tiny)
    measurements = (measured(own, settings) - runtime for settings in (SPARING, {}))
    return Figures(planned(own).peak, runtime, *measurements)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="narrow models; bars mean nothing")
    names = [str(shape) for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, help="of the eight")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        given = json.loads(args.only)
        measure_here(Shape(**{**given, "how": tuple(given["how"])}))
        return
    title = "A second step's peak, XLA off, MiB"
    table = Table("", *COLUMNS, title=title)
    bars: Bars = {}
    for shape in (shape for shape in SHAPES if str(shape) in args.shapes):
        figures = figures_of(shape, args.tiny)
        print(f"{shape}:", *figures.cells, flush=True)
        table.add_row(str(shape), *figures.cells)
        ratios = zip(("", ", without settings"), figures.ratios, strict=True)
        bars |= {f"{shape}{how}": (ratio, 1 - MOST, 1 + MOST) for how, ratio in ratios}
    Console().print(table)
    if not print_bars(bars) and args.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
